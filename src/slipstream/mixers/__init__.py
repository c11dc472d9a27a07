"""One file a mixer, by family. Called, it gives them all: `slipstream.mixers()` is {name: class}."""

from slipstream.core.rooms import callable_room

callable_room(__name__, "slipstream.core.registry", "mixers")
