"""Hugging Face folders of real model families, read into our models and written back.

    model = slipstream.load("path/of/a/folder")           families/*.py by the model_type of its config.json
    save_hf(model, "another/folder")                      what AutoModelForCausalLM.from_pretrained loads

Adding a family is one file in families/, found by walking the folder, and one test. In the file, a class of Family:

1. `model_types` it answers to (the first is written), `architecture` (the class of transformers that config.json names).
2. `config(hf: Fields) -> ModelConfig`: ours of theirs. Ask `hf` for every field that changes what is computed: `whole`, `number`,
   `flag`, `word`, `words` (one a layer), `wholes`, `table_of` (a table inside), each with theirs' default; `only(name, value)` for
   what is supported in one form alone; `ignore(names)` for what changes no logits in this family. Fields that nobody asked for
   are refused by the reader, except those of fields.BENIGN. Shared readings are in decoder.py: `sizes`, `heads`, `rope` (give
   `partial` where the family may turn a part of each head), `gated_mlp`, `windows`, and in experts.py `mixture`;
   `part(name, settings...)` is a mixer with its settings (None is left out: our default), and
   `pattern([(mixer, feedforward), ...])` the shortest pattern of all blocks, listed one by one or one for all alike.
3. `hf_config(model) -> dict`: theirs of ours, as well as it can be said, with the inverses `their_*` of decoder.py. No need to
   check that it is enough: write.py reads it back with `config` and refuses, in words, whatever came out different. Every
   setting of ours must be told from what transformers' class has as its default: write defaults out.
4. `rules(model) -> list[Rule]`: which tensors are which (weights.py: `rename`, `renames`, `cut`, `join`, `stack`, `rows`,
   `changed`, `fixed`, `Rule`). A rule that names a module holds for all tensors our model has in it; where blocks differ, make
   the rules of each with `rule.inside(f"model.layers.{i}", f"stack.blocks.{i}")`, or `in_blocks(rules, numbers)`. Ours are called
   `embedding`, `stack.blocks.I.norms.J`, `.mixers.J.*`, `.out_norms.J`, `stack.norm`, `head.proj`. Rules must undo each other
   bit by bit: no arithmetic on weights (a norm that adds one is another norm: ModelConfig.norm). Where some files have other
   tensors for one of ours than transformers writes, a rule says so by `otherwise`.
5. `surplus(name, config)`, where files hold tensors that the model computes nothing with.

Files of one family that name a tensor in two ways are made one by `spelling`. Models with layers of several kinds have them by
`layers_by_name`. What several families share is in decoder.py, experts.py, latent.py, state_space.py and gated_delta.py.

What a family does between layers is a field of ModelConfig (norm, norm_place, embedding_scale, ...), what it does in a layer a
setting of a mixer. What is in neither is refused: `hf.only`.

The test (tests/interop/theirs.py does it all): `hold_to(their_model("llama", **fields), tmp_path)` for a tiny random model of
transformers, once for each setting that matters: logits of the whole prompt, prefill at cuts and steps, the export loaded by
transformers, and tensors that come back bit by bit.
"""
