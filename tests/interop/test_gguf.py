"""Models as GGUF files: written here and read by transformers' own reader and the package gguf, and read back."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slipstream as ss
from slipstream.cli.app import app
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer
from slipstream.interop.config import ExportConfig
from slipstream.interop.export import export
from slipstream.interop.gguf.architecture import all_architectures
from slipstream.interop.gguf.blocks import BY_NAME, READERS, dequantised
from slipstream.interop.gguf.container import GGUF
from slipstream.interop.gguf.write import save_gguf
from slipstream.layers.quantised_linear import QuantisedLinear

from .theirs import COMMON, close, in_pieces, seeded, their_model, tokens

GEMMA = {"num_hidden_layers": 7, "query_pre_attn_scalar": 8, "sliding_window": 6, "tie_word_embeddings": True}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BARE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "expand": 2,
    "conv_kernel": 4,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
GRANITE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "embedding_multiplier": 3.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_chunk_size": 8}
FALCON_SCALES = {
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.4,
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.4,
    "ssm_out_multiplier": 0.5,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
    "mlp_multipliers": [1.3, 0.6],
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 6,
    "routed_scaling_factor": 1.7,
}
STRETCHED = {**YARN, "truncate": True, "mscale": 0.707, "mscale_all_dim": 0.707}
NEMOTRON = {
    **{k: v for k, v in COMMON.items() if k != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "ssm_state_size": 6,
    "n_groups": 2,
    "chunk_size": 8,
}
LFM2 = {
    **{k: v for k, v in COMMON.items() if k not in ("rms_norm_eps", "tie_word_embeddings", "head_dim")},
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "norm_eps": 1e-5,
}
QWEN3_NEXT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": True,
    **EXPERTS,
}
THEIRS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA31}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA | {"num_hidden_layers": 4}),
    "gemma3": ("gemma3_text", GEMMA),
    "olmo2": ("olmo2", {"head_dim": 8}),
    "lfm2": ("lfm2", LFM2 | {"block_auto_adjust_ff_dim": False}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen3moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 3, "num_key_value_heads": 4}),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "rope_parameters": YARN},
    ),
    "jamba": ("jamba", {"num_experts": 5, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "jamba dense": (
        "jamba",
        {
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "mamba_dt_rank": 3,
            "mamba_d_state": 8,
        },
    ),
    "granite": ("granitemoehybrid", GRANITE | {"num_local_experts": 5, "shared_intermediate_size": 96}),
    "granite dense": (
        "granitemoehybrid",
        GRANITE | {"num_local_experts": 0, "shared_intermediate_size": 40, "position_embedding_type": "rope"},
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "falcon-h1": ("falcon_h1", FALCON),
    "falcon-h1 norm": (
        "falcon_h1",
        FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
    ),
    "qwen3next": ("qwen3_next", QWEN3_NEXT),
    "deepseek v2": ("deepseek_v2", DEEPSEEK),
    "deepseek v2 lite": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "rope_parameters": STRETCHED}),
    "deepseek v3": ("deepseek_v3", DEEPSEEK | {"n_group": 3, "topk_group": 2, "norm_topk_prob": True}),
    "lfm2moe": ("lfm2_moe", LFM2 | EXPERTS | {"num_dense_layers": 1}),
    "mamba": ("mamba", BARE | {"state_size": 4, "time_step_rank": 3}),
    "mamba2": ("mamba2", BARE | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8}),
}
WITH_ONE = ("gemma2", "gemma3", "qwen3next")  # norms are kept with one added
ALONE = ("mamba", "mamba2", "lfm2", "lfm2moe", "nemotron_h")  # settings that other families do not have
WITH_RATES = (
    "mamba",
    "mamba2",
    "jamba",
    "jamba dense",
    "granite",
    "granite dense",
    "nemotron_h",
    "qwen3next",
    "falcon-h1",
    "falcon-h1 norm",
)  # rates are kept without their logarithm
WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
THEIR_READER = {  # with what transformers' reader of GGUF takes from its defaults, whatever the file says
    "llama": {},
    "llama tied": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": WIDE,
    "gemma3": WIDE,
    "mamba": {},
}


def theirs_and_ours(case, folder, **more):
    model_type, fields = THEIRS[case]
    theirs = seeded(model_type, **fields) if case in ALONE else their_model(model_type, **fields | more)
    if "num_experts_per_tok" in fields:
        theirs.set_experts_implementation("eager")
    theirs.save_pretrained(folder / "theirs")
    return theirs, ss.load(folder / "theirs")


@pytest.mark.parametrize("case", THEIRS)
def test_a_model_comes_back_bit_by_bit(case, tmp_path):
    theirs, ours = theirs_and_ours(case, tmp_path)
    architecture = save_gguf(ours, tmp_path / "a.gguf")
    back, x = ss.load(tmp_path / "a.gguf"), tokens(61)
    assert back.config == ours.config.model_copy(update={"context": back.config.context})
    with torch.no_grad():
        close(back(x), ours(x), 1e-5 if case in WITH_RATES else 0)
        close(back(x), theirs(input_ids=x, use_cache=False).logits)
        close(in_pieces(back, x), ours(x))
    for name, tensor in ours.state_dict().items():
        if name.endswith("A_log"):
            close(back.state_dict()[name], tensor, 1e-6)
        elif architecture not in WITH_ONE or tensor.ndim > 1:
            assert torch.equal(tensor, back.state_dict()[name]), name
    assert save_gguf(back, tmp_path / "b.gguf") == architecture
    if case not in WITH_RATES:
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_multipliers_become_a_part_of_weights(tmp_path):
    _, ours = theirs_and_ours("falcon-h1", tmp_path, **FALCON_SCALES)
    assert save_gguf(ours, tmp_path / "a.gguf") == "falcon-h1"
    back, x = ss.load(tmp_path / "a.gguf"), tokens(61)
    assert ours.config.embedding_scale == 2.5 and back.config.embedding_scale == 1
    with torch.no_grad():
        close(back(x), ours(x), 1e-5)


@pytest.mark.parametrize("case", THEIR_READER)
def test_transformers_reads_the_same_model(case, tmp_path):
    _, ours = theirs_and_ours(case, tmp_path, **THEIR_READER[case])
    ours = with_room_for_bytes(ours)
    save_gguf(ours, tmp_path / "a.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", attn_implementation="eager").eval()
    x = tokens(61)
    with torch.no_grad():
        close(theirs(input_ids=x, use_cache=False).logits, ours(x), 1e-5)


def with_room_for_bytes(model):
    """The same with 256 tokens, so that it can carry a tokenizer."""
    wide = ss.models.language_model.LanguageModel(model.config.model_copy(update={"vocab_size": 256}), byte_tokenizer())
    tensors = {n: padded(t, wide.state_dict()[n].shape) for n, t in model.state_dict().items()}
    wide.load_state_dict(tensors)
    return wide.eval()


def padded(tensor, shape):
    if tensor.shape == shape:
        return tensor
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    rows[: len(tensor)] = tensor
    return rows


@pytest.mark.parametrize("name", all_architectures())
def test_names_are_those_of_llama_cpp(name, tmp_path):
    case = next(c for c, (model_type, _) in THEIRS.items() if model_type == all_architectures()[name].model_type)
    _, ours = theirs_and_ours(case, tmp_path)
    architecture = all_architectures()[name].name
    assert save_gguf(ours, tmp_path / "a.gguf", name) == name
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    of_arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    known = {gguf.TENSOR_NAMES[t].format(bid=b, id=0, xid=0) for t in gguf.MODEL_TENSORS[of_arch] for b in range(7)}
    assert {t.name.removesuffix(".weight").removesuffix(".bias") for t in reader.tensors} <= known
    assert reader.fields["general.architecture"].contents() == architecture
    keys = [v for part in vars(gguf.Keys).values() if isinstance(part, type) for v in vars(part).values()]
    keys = {key.replace("{arch}", architecture) for key in keys if isinstance(key, str)}
    assert {key for key in reader.fields if not key.startswith("GGUF.")} <= keys
    for stored in reader.tensors:
        mine = GGUF(tmp_path / "a.gguf").raw(stored.name).numpy()
        assert np.array_equal(stored.data.reshape(-1).view(np.uint8), mine.reshape(-1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_in_two_bytes(dtype, tmp_path):
    _, ours = theirs_and_ours("llama", tmp_path)
    settings = {"run": str(tmp_path / "theirs"), "format": "gguf", "out": tmp_path / "a.gguf", "dtype": dtype}
    assert export(ExportConfig(**settings)) == "llama"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    back, x = ss.load(tmp_path / "a.gguf", "float32"), tokens(61)
    with torch.no_grad():
        close(back(x), ours(x), 3e-2)
    stored = ss.load(tmp_path / "a.gguf").embedding.weight
    assert stored.dtype == {"float16": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert torch.equal(stored.float(), ours.embedding.weight.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("name", READERS)
def test_blocks_are_the_numbers_of_the_package_gguf(name):
    kind, draw = BY_NAME[name], np.random.default_rng(0)
    blocks = draw.integers(0, 256, (64, kind.bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        want = dequantize(blocks, gguf.GGMLQuantizationType(kind.id)).reshape(64, -1)
    np.testing.assert_array_equal(dequantised(kind, torch.from_numpy(blocks)).numpy(), want)


def test_sizes_of_blocks():
    for kind in BY_NAME.values():
        assert gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.id)] == (kind.weights, kind.bytes)


def quantised_file(path, kind, tied=True):
    """A Llama whose matrices the package gguf has quantised, and what they stand for."""
    model = ss.language_model(
        "attention(n_heads=2, n_kv_heads=1)", n_layers=2, d_model=64, d_ff=96, tie_embeddings=tied, seed=1
    )
    model.tokenizer = byte_tokenizer()
    save_gguf(model, path.with_suffix(".plain"))
    plain, of_type = gguf.GGUFReader(path.with_suffix(".plain")), gguf.GGMLQuantizationType[kind]
    writer, weights = gguf.GGUFWriter(path, "llama"), {}
    for name, field in plain.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")) and len(field.data):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in plain.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        packed = quantize(tensor.data, of_type)
        weights[tensor.name] = torch.from_numpy(dequantize(packed, of_type))
        writer.add_tensor(tensor.name, packed, raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_blocks_with_one_scale_are_used_as_they_are(kind, tied, tmp_path, caplog):
    weights = quantised_file(tmp_path / "q.gguf", kind, tied)
    packed, plain = ss.load(tmp_path / "q.gguf"), ss.load(tmp_path / "q.gguf", "float32")
    assert packed.config.quantisation.to == "int8" and plain.config.quantisation is None and not caplog.messages
    assert torch.equal(plain.embedding.weight, weights["token_embd.weight"])
    matrices = {n: m for n, m in packed.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(matrices) == 2 * 7 + (1 if tied else 2), "four of attention, three of the feed-forward, the embedding's"
    for name, matrix in matrices.items():
        assert torch.equal(matrix.weight, plain.get_submodule(name.replace("embedding.matrix", "embedding")).weight)
    with torch.no_grad():
        close(packed(tokens(256)), plain(tokens(256)), 3e-2)
    packed.save(tmp_path / "ours")
    assert torch.equal(ss.load(tmp_path / "ours").head.proj.codes, packed.head.proj.codes)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_other_blocks_become_numbers_or_are_rounded_and_it_is_said(kind, tmp_path, caplog):
    weights = quantised_file(tmp_path / "q.gguf", kind)
    plain = ss.load(tmp_path / "q.gguf")
    assert f"blocks of {kind} become float32" in caplog.text
    assert torch.equal(plain.embedding.weight, weights["token_embd.weight"])
    packed = ss.load(tmp_path / "q.gguf", "int8")
    assert f"15 matrices of {kind}" in caplog.text
    ours, theirs = packed.stack.blocks[0].mixers[1].up_proj.weight, plain.stack.blocks[0].mixers[1].up_proj.weight
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_reading_does_not_import_torchs_compiler(tmp_path):
    """Which takes longer than most models."""
    save_gguf(ss.language_model("attention(n_heads=2)", n_layers=1, d_model=32), tmp_path / "a.gguf")
    script = "import sys, slipstream as ss; ss.load(sys.argv[1]); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.gguf"], check=True, timeout=300)


def test_what_llama_cpp_cannot_say_is_refused(tmp_path):
    model = ss.language_model("mlstm", n_layers=1, d_model=32)
    with pytest.raises(InputError, match="no architecture of llama"):
        save_gguf(model, tmp_path / "a.gguf")
    with pytest.raises(InputError, match="this family has attention layers, not mlstm"):
        save_gguf(model, tmp_path / "a.gguf", "llama")
    model = ss.language_model(
        "attention(n_heads=2, rope_scaling=llama3:factor=8:low=2:high=4:original=100)", n_layers=1, d_model=32
    )
    with pytest.raises(InputError, match="rope_scaling"):
        save_gguf(model, tmp_path / "a.gguf", "llama")
    with pytest.raises(InputError, match="no architecture of GGUF"):
        save_gguf(model, tmp_path / "a.gguf", "lama")
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(tmp_path):
    model = ss.language_model("attention(n_heads=2)", n_layers=1, d_model=32, seed=3)
    model.tokenizer = byte_tokenizer()
    model.save(tmp_path / "run")
    file = str(tmp_path / "a.gguf")
    said = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", "gguf", "--out", file])
    assert f"written to {file} as llama" in said.output.replace("\n", " ")
    said = CliRunner().invoke(app, ["generate", file, "Once upon", "--max-new-tokens", "5", "--temperature", "0"])
    assert said.stdout.strip() == "".join(ss.generate(model, "Once upon", 5, temperature=0)).strip()
    with pytest.raises(InputError, match="is a folder; --out takes a file"):
        export(ExportConfig(run=file, format="gguf", out=tmp_path / "run"))
