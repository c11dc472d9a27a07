"""Text out of a model. Called, it streams: `slipstream.generate(model, prompt)`."""

from slipstream.core.rooms import callable_room

callable_room(__name__, "slipstream.generate.stream", "generate")
