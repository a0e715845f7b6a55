"""Weights of few bits: rounding, the layout of files, saving, loading with and without the library, adapters."""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from rounded_models import RELEASES, inputs_of, release
from safetensors.torch import load_file, save_file
from tiny import awake, text_config, tiny_vlm, vlm_config
from tiny_training import save_tiny_model
from torch import nn

from visualrwkv_hf import VisualRWKVForConditionalGeneration, accelerate_on_cpu
from visualrwkv_hf.conversion import ConversionError, quantize, to_original
from visualrwkv_hf.cpu.layers import Int4Linear, Int8Linear
from visualrwkv_hf.cpu.packed import (
    pack,
    packed_tensors,
    quantization_config,
    refuse_strange_quantization,
    unpack,
    unpacked,
)
from visualrwkv_hf.cpu.rounding import WEIGHTS, rounded, rounding_of
from visualrwkv_hf.dispatch import kernel_backend
from visualrwkv_hf.inference import model_cache
from visualrwkv_hf.inference.loading import load_model

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# --- rounding and packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rounding_is_within_half_a_step(weights, dtype):
    """Half a step of the scale; int4 has 7 steps on one side of zero, so there it can be a whole one."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(40, 96)).to(dtype)
    weight[3] = 0
    near = rounded(weight, weights)
    assert near.scale.dtype == dtype and near.integers.dtype == torch.int8
    steps = near.scale.float().abs().repeat_interleave(96 // near.scale.shape[1], 1)
    off = (near.widened() - weight.float()).abs()
    assert (off <= (0.51 if weights == "int8" else 1.05) * steps).all()
    assert (near.widened()[3] == 0).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_are_rounded_alone(weights, monkeypatch):
    """A weight is brought to float32 a few rows at a time."""
    torch.manual_seed(0)
    weight = torch.randn(50, 64)
    whole = rounded(weight, weights)
    monkeypatch.setattr("visualrwkv_hf.cpu.rounding.PANEL_WEIGHTS", 64 * 7)
    in_panels = rounded(weight, weights)
    assert torch.equal(in_panels.integers, whole.integers) and torch.equal(in_panels.scale, whole.scale)


def test_weights_that_are_not_finite_are_not_rounded():
    weight = torch.ones(2, 64)
    weight[1, 3] = float("nan")
    for weights in WEIGHTS:
        with pytest.raises(ValueError, match="NaN or infinite"):
            rounded(weight, weights)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_neighbours_from_the_lowest_bits_on(bits):
    """Word by word with Python's integers."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = torch.randint(low, high + 1, (3, 32), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    words = pack(integers, bits)
    assert words.shape == (3, bits) and torch.equal(unpack(words, bits), integers)
    per_word = 32 // bits
    for row, line in enumerate(integers.tolist()):
        for column in range(bits):
            some = line[column * per_word : (column + 1) * per_word]
            expected = sum((value - low) << (bits * place) for place, value in enumerate(some))
            assert int(words[row, column]) % 2**32 == expected


@needs_library
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_library_packs_and_widens_the_same(weights):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    layers = {"layers.0.att.key": weights}
    scheme = QuantizationConfig.model_validate(quantization_config(layers)).config_groups["group_0"]
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    near = rounded(weight, weights)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = library.compress({"weight": near.widened(), "weight_scale": near.scale}, scheme)
    assert torch.equal(packed["weight_packed"], pack(near.integers, near.bits))
    assert torch.equal(library.decompress(packed, scheme)["weight"], near.widened())


def test_what_is_rounded():
    names = {
        "model.language_model.layers.3.att.key": "int4",
        "model.language_model.layers.3.ffn.value": "int4",
        "base_model.model.model.layers.0.att.output": "int4",
        "lm_head": "int8",
        "model.vision_tower.clip.encoder.layers.0.self_attn.k_proj": None,
        "model.multi_modal_projector.proj": None,
        "model.language_model.layers.3.att.key.lora_A.default": None,
    }
    for name, expected in names.items():
        assert rounding_of(name, 64, "int4") == expected, name
        assert rounding_of(name, 64, None) is None
    assert rounding_of("layers.0.att.key", 72, "int4") == "int8"  # groups of 32 do not fill the rows
    assert rounding_of("layers.0.att.key", 30, "int4") is None


# --- models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RELEASES)
def kind(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_folder_computes_what_memory_does(kind, weights, dtype, tmp_path):
    """Bit for bit, through files of `quantize`, of `save_pretrained`, and rounding while loading."""
    model = release(kind).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    inputs = inputs_of(model, dtype)
    in_memory = accelerate_on_cpu(copy.deepcopy(model), weights=weights)
    expected = in_memory(**inputs).logits
    in_memory.save_pretrained(tmp_path / "saved")
    quantize(tmp_path / "dense", tmp_path / "quantised", weights=weights)
    saved, made = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "quantised"))
    assert set(saved) == set(made) and all(torch.equal(saved[name], made[name]) for name in made)
    for folder, asked in (("saved", None), ("quantised", None), ("dense", weights)):
        loaded = load_model(str(tmp_path / folder), "cpu", weights=asked)
        assert type(loaded.lm_head) is Int8Linear and not loaded.training
        assert torch.equal(loaded(**inputs).logits, expected), folder
        assert loaded.config.quantization_config == in_memory.config.quantization_config
    ids = [x.generate(**inputs, max_new_tokens=4, do_sample=False) for x in (loaded, in_memory)]
    assert torch.equal(*ids)


@torch.no_grad()
@needs_library
@pytest.mark.parametrize("weights", WEIGHTS)
def test_transformers_reads_a_quantised_folder(kind, weights, tmp_path):
    """Dense at the first forward pass, or with native ops if `accelerate_on_cpu` comes first."""
    model = release(kind)
    model.save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "quantised", weights=weights)
    inputs = inputs_of(model, torch.float32)
    expected = load_model(str(tmp_path / "quantised"), "cpu")(**inputs).logits
    loaded = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path / "quantised")
    assert loaded.lm_head.weight_packed.dtype == torch.int32
    native = accelerate_on_cpu(copy.deepcopy(loaded))
    assert torch.equal(native(**inputs).logits, expected)
    with kernel_backend("torch"):  # native ops read prompts in integers
        assert error(loaded(**inputs).logits, native(**inputs).logits) < 1e-5
    assert (
        type(loaded.lm_head.weight) is nn.Parameter
    )  # plain layers from now on, without the library's forward
    with kernel_backend("torch"):
        answers = [x.generate(**inputs, max_new_tokens=3, do_sample=False) for x in (loaded, native)]
    assert torch.equal(*answers)


@torch.no_grad()
@needs_library
def test_a_model_of_the_library_is_saved_as_it_is(tmp_path):
    """Packed before its first forward pass, dense after it."""
    model = tiny_vlm()
    accelerate_on_cpu(copy.deepcopy(model), weights="int4").save_pretrained(tmp_path / "first")
    loaded = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "packed")
    names = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "first" / "model.safetensors").keys()
    inputs = inputs_of(model, torch.float32)
    expected = loaded(**inputs).logits
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("accelerate", [True, False])
def test_the_library_is_not_needed(accelerate, tmp_path, monkeypatch):
    """Plain torch, as every other device, gets dense weights."""
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    model = tiny_vlm()
    rounded_model = accelerate_on_cpu(copy.deepcopy(model), weights="int4")
    rounded_model.save_pretrained(tmp_path)
    inputs = inputs_of(model, torch.float32)
    loaded = load_model(str(tmp_path), "cpu", accelerate=accelerate)
    assert (type(loaded.model.language_model.layers[0].att.key) is Int4Linear) == accelerate
    with kernel_backend("torch"):
        assert error(loaded(**inputs).logits, rounded_model(**inputs).logits) < 1e-5
    if not accelerate:
        assert not hasattr(loaded.config, "quantization_config")


@torch.no_grad()
def test_larger_groups_of_other_peoples_files_are_read(tmp_path):
    """A scale for each 64 weights of a row is two equal ones for each 32."""
    model = accelerate_on_cpu(tiny_vlm(), weights="int4")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.language_model.layers.0.att.key"
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"][:, :1].contiguous()
    save_file(tensors, path, {"format": "pt"})
    key = load_model(str(tmp_path), "cpu").get_submodule(name)
    assert key.scale.shape == (64, 2) and torch.equal(key.scale[:, 0], key.scale[:, 1])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_state_dicts_load_packed_and_dense(weights):
    layer = {"int8": Int8Linear, "int4": Int4Linear}[weights]
    torch.manual_seed(0)
    one, two = (layer(nn.Linear(64, 8, bias=False)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.widened(), one.widened())
    dense = nn.Linear(64, 8, bias=False)
    two.load_state_dict(dense.state_dict())
    assert torch.equal(two.widened(), layer(dense).widened())
    with pytest.raises(RuntimeError, match="Missing key"):
        two.load_state_dict({})
    with pytest.raises(RuntimeError, match="has the shape"):
        two.load_state_dict({"weight": torch.zeros(4, 64)})


@pytest.mark.parametrize("weights", WEIGHTS)
def test_changing_the_dtype_keeps_the_weights(weights):
    layer = {"int8": Int8Linear, "int4": Int4Linear}[weights](nn.Linear(64, 8, bias=False))
    before = layer.widened()
    assert torch.equal(layer.bfloat16().widened(), before)
    assert torch.equal(copy.deepcopy(layer).rounded().widened(), before)


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_lora_is_trained_on_rounded_weights(weights, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = accelerate_on_cpu(tiny_vlm(version=7), weights=weights)
    stored = base.state_dict()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["att.key", "ffn.value"], r=4))
    inputs = inputs_of(base, torch.float32)
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    fresh = accelerate_on_cpu(tiny_vlm(version=7), weights=weights)
    assert all(torch.equal(x, stored[name]) for name, x in fresh.state_dict().items())
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    model.eval()
    with torch.no_grad():
        assert error(loaded(**inputs).logits, model(**inputs).logits) < 1e-5


# --- folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("dense") / "model")


def test_a_quantised_folder_says_what_it_is(dense, tmp_path):
    for name in ("LICENSE", "thesis.tex"):
        (dense / name).write_text("beside the weights")
    quantize(dense, tmp_path / "int4", weights="int4", max_shard_size="100KB")
    fields = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    refuse_strange_quantization(fields, "config.json")
    assert {group["weights"]["num_bits"] for group in fields["config_groups"].values()} == {4, 8}
    assert any("vision_tower" in pattern for pattern in fields["ignore"])
    card = (tmp_path / "int4" / "README.md").read_text()
    assert "Weights in int4" in card and "| int4 |" in card and "| int8 |" in card
    assert (tmp_path / "int4" / "LICENSE").read_text() == "beside the weights"
    assert not (tmp_path / "int4" / "thesis.tex").exists(), "no file of a model"
    assert (tmp_path / "int4" / "modeling_visualrwkv.py").exists()
    assert len(list((tmp_path / "int4").glob("model-*.safetensors"))) > 1
    assert model_cache.weights_format(tmp_path / "int4") == "int4"


def test_quantising_refuses_in_a_sentence(dense, tmp_path, tmp_path_factory):
    damaged = shutil.copytree(dense, tmp_path_factory.mktemp("damaged") / "model")
    tensors = load_file(damaged / "model.safetensors")
    del tensors[f"{NAME}.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    quantize(dense, tmp_path / "int8", weights="int8", dtype="bfloat16")
    assert (
        next(load_model(str(tmp_path / "int8"), "cpu").model.vision_tower.parameters()).dtype
        == torch.bfloat16
    )
    for arguments, weights, message in (
        ((tmp_path / "int8", tmp_path / "again"), "int4", "of few bits already"),
        ((dense, dense), "int8", "cannot be written into itself"),
        ((dense, tmp_path / "int8"), "int8", "is not empty"),
        ((dense, tmp_path / "x"), "int3", "weights must be int8 or int4, got 'int3'"),
        ((tmp_path / "nothing", tmp_path / "x"), "int8", "has no config.json"),
        ((damaged, tmp_path / "x"), "int8", "att.key.weight in .* is missing: the weights do not fit"),
    ):
        with pytest.raises(ConversionError, match=message):
            quantize(*arguments, weights=weights)
    with pytest.raises(ConversionError, match="what rounding has lost cannot be restored"):
        to_original(tmp_path / "int8", tmp_path / "back.pth")
    with pytest.raises(ValueError, match="are in int8: they cannot be loaded in int4"):
        load_model(str(tmp_path / "int8"), "cpu", weights="int4")
    with pytest.raises(ValueError, match="nothing computes with them with plain torch"):
        load_model(str(dense), "cpu", weights="int4", accelerate=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8"]


NAME = "model.language_model.layers.0.att.key"


def scales_of_another_shape(tensors, fields):
    tensors[f"{NAME}.weight_scale"] = torch.ones(63, 2)


def scales_of_many_groups(tensors, fields):
    tensors[f"{NAME}.weight_scale"] = torch.ones(64, 4)


def scales_missing(tensors, fields):
    del tensors[f"{NAME}.weight_scale"]


def scales_infinite(tensors, fields):
    tensors[f"{NAME}.weight_scale"][3] = float("inf")


def scales_of_integers(tensors, fields):
    tensors[f"{NAME}.weight_scale"] = torch.ones(64, 2, dtype=torch.int32)


def words_of_odd_length(tensors, fields):
    tensors[f"{NAME}.weight_packed"] = torch.ones(64, 7, dtype=torch.int32)


def words_of_bytes(tensors, fields):
    tensors[f"{NAME}.weight_packed"] = tensors[f"{NAME}.weight_packed"].to(torch.int64)


def words_of_no_layer(tensors, fields):
    tensors["model.language_model.layers.0.att.w1.weight_packed"] = torch.ones(64, 8, dtype=torch.int32)


def another_shape(tensors, fields):
    tensors[f"{NAME}.weight_shape"] = torch.tensor([64, 2**40])


def negative_group(tensors, fields):
    fields["config_groups"]["group_1"]["weights"]["group_size"] = -32


def zero_points(tensors, fields):
    fields["config_groups"]["group_1"]["weights"]["symmetric"] = False


def floats(tensors, fields):
    fields["config_groups"]["group_1"]["weights"]["type"] = "float"


def activations(tensors, fields):
    fields["config_groups"]["group_1"]["input_activations"] = {"num_bits": 8}


def another_layout(tensors, fields):
    fields["format"] = "nvfp4-pack-quantized"


def another_library(tensors, fields):
    fields["quant_method"] = "awq"


def groups_of_nothing(tensors, fields):
    fields["config_groups"]["group_1"] = {"weights": 4}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scales_of_another_shape, r"shape \[63, 2\], \[64, 2\] can be read"),
        (scales_of_many_groups, r"shape \[64, 4\]"),
        (scales_missing, "but no .*weight_scale"),
        (scales_infinite, "NaN or infinite"),
        (scales_of_integers, "dtype torch.int32"),
        (words_of_odd_length, r"shape \[64, 7\], which is no weight of 64 x 64 in 8 or 4 bits"),
        (words_of_bytes, "dtype torch.int64"),
        (words_of_no_layer, "the model has no such linear layer"),
        (another_shape, "stored with the shape"),
        (negative_group, "group_size in .* must be positive, got -32"),
        (zero_points, "symmetric in .* must be True, got False"),
        (floats, "type in .* must be int, got 'float'"),
        (activations, "rounds activations"),
        (another_layout, "only pack-quantized can be read"),
        (another_library, "quantised by 'awq'"),
        (groups_of_nothing, "must be an object, got 4"),
    ],
)
def test_strange_folders_are_refused_in_a_sentence(damage, message, tmp_path):
    model = accelerate_on_cpu(tiny_vlm(), weights="int4")
    model.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, fields = load_file(path), json.loads(config.read_text())
    damage(tensors, fields["quantization_config"])
    save_file(tensors, path, {"format": "pt"})
    config.write_text(json.dumps(fields))
    for accelerate in (True, False):
        with pytest.raises(ValueError, match=message) as refusal:
            load_model(str(tmp_path), "cpu", accelerate=accelerate)
        assert "\n" not in str(refusal.value)


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_weight_that_moves_leaves_nothing_behind(kind):
    """A view keeps what it is a view of, also when its data is exchanged for a copy elsewhere."""
    layer = {"int8": Int8Linear, "int4": Int4Linear}[kind](nn.Linear(64, 8, bias=False))
    held = packed_tensors(layer.rounded())
    for each in (layer, type(layer).of(unpacked(held["weight_packed"], held["weight_scale"], 64))):
        for tensor in each.tensors():
            before = weakref.ref(tensor if tensor._base is None else tensor._base)
            storage = tensor.untyped_storage().data_ptr()
            tensor.data = tensor.data.clone()
            base = before()
            assert base is tensor or base.untyped_storage().data_ptr() != storage


PEAK = """
import sys
import torch
from visualrwkv_hf.inference.loading import load_model
folder, dtype, weights, huge_pages = sys.argv[1:]
from visualrwkv_hf.cpu.packed_loading import WhileLoading  # what is imported counts as the base
import visualrwkv_hf.modeling_visualrwkv, visualrwkv_hf.conversion.folders
from visualrwkv_hf.cpu.ops import unusable
unusable(); torch.ones(300, 300) @ torch.ones(300, 300)
load_config = __import__("visualrwkv_hf.inference.loading", fromlist=["x"]).load_config(folder)
def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak of the past is forgotten
before = resident("VmRSS")
weights = weights if weights != "none" else None
model = load_model(folder, "cpu", dtype, weights=weights, huge_pages=huge_pages == "True")
peak = resident("VmHWM")
size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
print(peak - before, size)
"""


def peak_of_loading(folder, dtype, weights, huge_pages=True) -> tuple[int, int]:
    """Return by how many bytes loading raised the largest memory, and the bytes of the model's weights."""
    command = [sys.executable, "-c", PEAK, str(folder), dtype, weights or "none", str(huge_pages)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose weights are large beside what surrounds them: 0.7 GB in bfloat16."""
    text = text_config(6, vocab_size=65536, hidden_size=1024, head_dim=64, num_hidden_layers=16)
    torch.manual_seed(0)
    model = VisualRWKVForConditionalGeneration(vlm_config(6, vocab_size=65536, text_config=text.to_dict()))
    folder = tmp_path_factory.mktemp("wide")
    awake(model).bfloat16().save_pretrained(folder)
    return folder


LARGEST = 2 * 65536 * 1024
"""Bytes of the largest tensor of `wide`, the embedding or the head."""

CONSTANT = 100 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is told and given back as on Linux")
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_holds_no_tensor_twice(dtype, weights, wide, tmp_path):
    """At most the result, the largest tensor with what rounding makes of it, and a constant."""
    peak, size = peak_of_loading(wide, dtype, weights)
    print(f"peak {peak:,}, weights {size:,}")
    assert peak < 1.1 * size + 2 * LARGEST + CONSTANT
    if weights:
        quantize(wide, tmp_path / "small", weights=weights)
        peak, size = peak_of_loading(tmp_path / "small", dtype, None)
        print(f"peak {peak:,}, weights {size:,}, from files")
        assert peak < 1.1 * size + 2 * LARGEST + CONSTANT


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is told and given back as on Linux")
def test_weights_that_are_read_once_leave_the_memory(wide):
    """Loading checks each weight for NaN. Pages of the file that it has read need not stay."""
    peak, size = peak_of_loading(wide, "auto", None, huge_pages=False)
    print(f"peak {peak:,}, weights {size:,}")
    assert peak < 0.5 * size


@pytest.mark.parametrize("group", [32, 64])
def test_packed_int4_is_put_in_order_without_being_unpacked(group):
    weight = rounded(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), "int4")
    scale = weight.scale[:, :: group // 32].contiguous()
    words = pack(weight.integers, 4)
    ours = Int4Linear.of_packed(words, scale, 128)
    theirs = Int4Linear.of(unpacked(words, scale, 128))
    for x, y in zip(ours.tensors(), theirs.tensors()):
        assert torch.equal(x, y) and x.is_contiguous()
    assert (ours.in_features, ours.out_features, ours.original_dtype) == (128, 8, scale.dtype)
