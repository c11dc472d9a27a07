"""From a folder to a model: whose it is, in which dtype, with which tokenizer, and what is refused in words."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_vocabulary
from slipstream.generate.batch import generate_batch
from slipstream.interop.hf.write import save_hf

from .theirs import change, close, their_model, tokens

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n<{{ m.role }}>{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a token each for begin, end and pad; every text begins with the first of these."""
    made = Tokenizer(models.BPE(byte_vocabulary(), []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


@pytest.fixture
def folder(tmp_path):
    """A llama with a tokenizer, as transformers saves it."""
    model = their_model("llama", vocab_size=259, bos_token_id=256, eos_token_id=257, num_hidden_layers=2)
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=[257, 10], do_sample=False)
    model.save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_text_begins_and_ends_as_the_checkpoint_says(folder):
    model, theirs = ss.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.conventions.eos_ids == (257, 10) and model.conventions.bos_id == 256
    ids = AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt").input_ids
    want = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    stream = ss.generate(model, "Hello", max_new_tokens=40, temperature=0)
    text = "".join(stream)
    told = want[:-1] if want[-1] in (257, 10) else want
    assert text == model.tokenizer.decode(told, skip_special_tokens=False).rstrip(
        "\ufffd"
    )  # what is no whole character
    assert generate_batch(model, ["Hello", "Good morning"], max_new_tokens=40, temperature=0)[0] == text


@pytest.mark.parametrize("end", [0, 3, 7])
def test_an_end_token_ends_the_text_and_is_not_shown(folder, end):
    model = ss.load(folder)
    plain = list(ss.generate(model, [1, 2, 3], max_new_tokens=12, temperature=0))
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": plain[end]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    stream = ss.generate(ss.load(folder), [1, 2, 3], max_new_tokens=12, temperature=0)
    assert list(stream) == plain[: plain.index(plain[end])] and stream.ended == "stop"


def test_chat_templates_give_what_transformers_gives(folder):
    model, theirs = ss.load(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}, {"role": "model", "content": "Yes?"}]
    for answer in (True, False):
        want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        assert model.conventions.prompt(messages, answer) == want
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    said = "".join(ss.generate(model, messages, max_new_tokens=5, temperature=0))
    assert said == "".join(
        ss.generate(model, "", state=ss.generate(model, ids, max_new_tokens=0).reading, max_new_tokens=5, temperature=0)
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ raise_exception('only users speak') }}",
        "{{ messages.append(1) }}",
        "{% if %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="does not take these messages"):
        ss.load(folder).conventions.prompt([{"role": "user", "content": "Hi"}])


def test_own_checkpoints_keep_conventions_and_transformers_reads_them(folder, tmp_path):
    model = ss.load(folder)
    model.save(tmp_path / "ours")
    again = ss.load(tmp_path / "ours")
    assert again.conventions == model.conventions and again.config == model.config
    save_hf(again, tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    first = AutoTokenizer.from_pretrained(folder)
    assert theirs("Hi there").input_ids == first("Hi there").input_ids and theirs.eos_token == "</s>"
    assert theirs.chat_template == first.chat_template


@pytest.mark.parametrize("dtype", [None, "float32", "float64", torch.bfloat16])
def test_dtypes_are_as_stored_or_as_asked(folder, dtype):
    weights = load_file(folder / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    change(folder, dtype="bfloat16")
    model = ss.load(folder, dtype)
    wanted = torch.bfloat16 if dtype in (None, torch.bfloat16) else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    x = tokens(259)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
        close(model(x).float(), theirs(input_ids=x).logits.float(), 5e-2 if wanted is torch.bfloat16 else 1e-4)


def test_torch_pickles_are_read_as_weights_alone(folder):
    weights = load_file(folder / "model.safetensors")
    want = ss.load(folder)(tokens(259))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(ss.load(folder)(tokens(259)), want)
    torch.save({"model.norm.weight": print}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as weights alone"):
        ss.load(folder)


REFUSED = {
    "an unknown family": ({"model_type": "lama"}, "did you mean llama"),
    "no family": ({"model_type": None}, "no family of models"),
    "an unknown field": ({"attention_chunk_size": 128}, "attention_chunk_size"),
    "a scaling that depends on length": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "'dynamic' must be one of",
    ),
    "a scaling field": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "bend": 1}}, "'bend'"),
    "an activation": ({"hidden_act": "quick_gelu"}, "quick_gelu"),
    "partial rotations": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "whole heads"),
    "a quantised one": ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    "another width": ({"intermediate_size": 47}, "config.json makes"),
    "more layers": ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, "does not speak of"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "does not divide"),
    "a tie that is none": ({"tie_word_embeddings": True}, "differs from the embeddings"),
    "an encoder": ({"is_decoder": True}, "is_decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_another_model_is_refused(folder, case):
    fields, complaint = REFUSED[case]
    change(folder, **fields)
    with pytest.raises(InputError, match=complaint):
        ss.load(folder)


def test_benign_fields_change_nothing(folder):
    want = ss.load(folder)(tokens(259))
    change(
        folder,
        use_cache=False,
        initializer_range=3.0,
        pretraining_tp=2,
        attention_dropout=0.5,
        transformers_version="4",
    )
    assert torch.equal(ss.load(folder)(tokens(259)), want)


def test_old_settings_of_positions_are_read(folder):
    """Before transformers 5, rope_theta and rope_scaling stood by themselves."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    change(folder, rope_parameters={"rope_theta": 500.0, **scaling})
    new = ss.load(folder)
    change(folder, rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert ss.load(folder).config == new.config


def test_a_name_that_is_no_folder_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"no folder nobody/nothing.*hub"):
        ss.load("nobody/nothing")


def test_a_mistyped_folder_is_no_hub_name(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(InputError, match="did you mean llama"):
        ss.load(f"{folder.parent.name}/lllama")


def test_a_file_of_weights_stands_for_its_folder(folder):
    assert torch.equal(ss.load(folder / "model.safetensors")(tokens(259)), ss.load(folder)(tokens(259)))
    with pytest.raises(InputError, match="did you mean float32"):
        ss.load(folder, "float3")
