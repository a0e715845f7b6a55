"""Attacks on the native CPU ops: arguments out of range, weights of other formats, and the cache of compiled code."""

import os
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from tiny import awake, text_config, tiny_vlm

from visualrwkv_hf import VisualRWKVForCausalLM, accelerate_on_cpu, dispatch, kernel_backend, wkv6, wkv7
from visualrwkv_hf.cpu import library, ops

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="native ops need a C compiler"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache with the compiled library, for tests that copy it."""
    folder = tmp_path_factory.mktemp("built") / "visualrwkv_hf"
    ops.build_native_ops(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and a process that has not loaded the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ops, "_library", None)
    monkeypatch.setattr(ops, "_failure", "")
    return tmp_path / "visualrwkv_hf"


@pytest.fixture
def filled(cache, built) -> Path:
    """The path of a whole library in the cache folder."""
    shutil.copytree(built, cache)
    cache.chmod(0o700)
    (path,) = cache.glob("*.so")
    return path


# --- arguments out of range --------------------------------------------------------------------------------


def inputs_of(op, T: int = 6, K: int = 16) -> dict[str, torch.Tensor]:
    r, k, v, a, b = torch.randn(5, 1, T, 2, K)
    inputs = dict(r=r, w=-torch.rand(1, T, 2, K), k=k, v=v)
    return inputs | (dict(u=torch.randn(2, K)) if op is wkv6 else dict(a=a, b=b))


@pytest.mark.parametrize("entry", [6, 2**40, -7, -(2**63)])
@pytest.mark.parametrize("op", [wkv6, wkv7])
def test_order_outside_the_sequence_is_refused(op, entry, built):
    order = torch.arange(6)[None]
    order[0, 3] = entry
    with kernel_backend("native"), pytest.raises(ValueError, match="order must hold tokens"):
        op(**inputs_of(op), order=order)


@pytest.mark.parametrize("begin", [[0, 3, 2**40], [0, 7], [-4, 6], [0, 5, 3, 6], [2, 6]])
@pytest.mark.parametrize("op", [wkv6, wkv7])
def test_packed_sequences_outside_the_row_are_refused(op, begin, built):
    begin = torch.tensor(begin)
    with kernel_backend("native"), pytest.raises(ValueError, match=r"cu_seqlens must ascend from 0 to T = 6"):
        op(**inputs_of(op), cu_seqlens=begin)


@pytest.mark.parametrize("entry", [17, -18, 2**40])
@torch.no_grad()
def test_scan_order_outside_the_prompt_is_refused_by_an_accelerated_model(entry, built):
    model = accelerate_on_cpu(awake(VisualRWKVForCausalLM(text_config(7))))
    order = torch.arange(17)[None]
    order[0, 5] = entry
    with pytest.raises(ValueError, match="scan_orders"):
        model(torch.ones(1, 17, dtype=torch.long), scan_orders=[order])


def wkv_arguments(**changes) -> list:
    """Arguments of the C function `wkv` for one sequence of 4 tokens and one head of 8, with some replaced."""
    x = torch.zeros(8 * 1024)
    sizes = dict(N=1, tokens=4, H=1, K=8, V=8) | {
        n: v for n, v in changes.items() if n not in ("begin", "order")
    }
    begin = torch.tensor(changes.get("begin", [0, 4]))
    order = torch.tensor(changes.get("order", [0, 1, 2, 3]))
    return [*sizes.values(), begin, order, x, x, x, x, None, None, x, x.clone(), x.clone()]


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"order": [0, 1, 2, 4]}, "ORDER_OUT_OF_RANGE"),
        ({"order": [0, 1, 2, -6]}, "ORDER_OUT_OF_RANGE"),
        ({"begin": [0, 5]}, "ORDER_OUT_OF_RANGE"),
        ({"begin": [-1, 4]}, "ORDER_OUT_OF_RANGE"),
        ({"begin": [3, 1], "tokens": 4}, "ORDER_OUT_OF_RANGE"),
        ({"K": 257}, "SIZE_OUT_OF_RANGE"),
        ({"K": 0}, "SIZE_OUT_OF_RANGE"),
        ({"V": 0}, "SIZE_OUT_OF_RANGE"),
        ({"H": -1}, "SIZE_OUT_OF_RANGE"),
    ],
)
def test_c_is_a_second_fence(changes, error, built):
    with pytest.raises(RuntimeError, match=f"The native op wkv refused its arguments: {error}"):
        ops.library().call("wkv", *wkv_arguments(**changes))


def test_c_computes_what_is_in_range(built):
    """The outputs of its 4 tokens are written, and nothing after them."""
    *arguments, out = wkv_arguments()
    ops.library().call("wkv", *arguments, out.fill_(float("nan")))
    assert not out[: 4 * 8].any() and out[4 * 8 :].isnan().all()


@pytest.mark.parametrize("columns, tag, error", [(24, 0, "SIZE_OUT_OF_RANGE"), (16, 4, "FORMAT_UNKNOWN")])
def test_c_refuses_a_product_that_it_cannot_read(columns, tag, error, built):
    x = torch.zeros(1024)
    with pytest.raises(RuntimeError, match=error):
        ops.library().call("linear", 1, columns, 2, tag, x, None, x, x.clone())


@pytest.mark.parametrize(
    "columns, tag, x_tag, error",
    [
        (24, 3, 0, "SIZE_OUT_OF_RANGE"),
        (32, 0, 0, "FORMAT_UNKNOWN"),
        (32, 3, 3, "FORMAT_UNKNOWN"),
        (16, 4, 0, "FORMAT_UNKNOWN"),
    ],
)
def test_c_refuses_a_product_in_int8_that_it_cannot_read(columns, tag, x_tag, error, built):
    x = torch.zeros(1024)
    with pytest.raises(RuntimeError, match=error):
        ops.library().call("linear_int8", 1, columns, 2, tag, x, x, x_tag, x, x.clone())


def tokens_of(model, ids: torch.Tensor, state=None) -> tuple[torch.Tensor, object]:
    """The logits of ids [B, T] read one after the other, and the state after them."""
    logits = []
    for token in ids.split(1, 1):
        out = model(token, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("version", [5, 6, 7])
@torch.no_grad()
def test_heads_that_are_too_large_are_computed_by_torch(version, built):
    """Also after a state that was read before the model was accelerated."""
    model = awake(VisualRWKVForCausalLM(text_config(version, hidden_size=320, head_dim=320)))
    ids = torch.randint(1, 320, (1, 6), generator=torch.Generator().manual_seed(0))
    state = model(ids[:, :3], use_cache=True).past_key_values
    expected, _ = tokens_of(model, ids[:, 3:], state.copy())
    accelerate_on_cpu(model)
    with pytest.warns(UserWarning, match="keys of 320 elements are larger than 256"):
        dispatch._said.clear()
        found, _ = tokens_of(model, ids[:, 3:], state.copy())
    assert (found - expected).norm() < 1e-5 * expected.norm()


# --- weights of other formats ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float32])
@torch.no_grad()
def test_weights_of_another_dtype_are_refused(dtype, built):
    """torch multiplies no mixture, so an accelerated model does not either: it never reads one format as another."""
    model = accelerate_on_cpu(awake(VisualRWKVForCausalLM(text_config(7))).bfloat16())
    ids = torch.ones(1, 1, dtype=torch.long)
    state = model(ids, use_cache=True).past_key_values
    layer = model.model.layers[1].att.key
    layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    for backend in ("auto", "torch"):
        with kernel_backend(backend), pytest.raises((RuntimeError, NotImplementedError)):
            model(ids, past_key_values=state.copy())


@torch.no_grad()
@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors wants Python 3.11")
def test_int8_model_saves_a_folder_that_loads(tmp_path, built):
    from visualrwkv_hf import VisualRWKVForConditionalGeneration

    model = accelerate_on_cpu(tiny_vlm(version=7), int8=True)
    model.save_pretrained(tmp_path)
    again = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.randint(1, 300, (1, 5), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    # The native ops round what a layer of few rows reads to 16 bits.
    assert (again(ids).logits - expected).norm() < 5e-4 * expected.norm()


# --- the cache of compiled code ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "relative/folder", ".", "~/cache"])
def test_cache_of_a_relative_path_is_ignored(value, monkeypatch, tmp_path):
    """A library in the current folder may be anybody's."""
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.cache_folder() == tmp_path / ".cache" / "visualrwkv_hf"


def test_cache_is_for_its_user_alone(cache):
    path = ops.build_native_ops()
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in cache.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_cache_that_others_may_write_to_is_refused(mode, filled):
    filled.parent.chmod(mode)
    with pytest.raises(RuntimeError, match="may write to it"):
        ops.build_native_ops()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root can give a folder away")
def test_cache_of_another_user_is_refused(filled):
    os.chown(filled.parent, 12345, -1)
    with pytest.raises(RuntimeError, match="another user owns it"):
        ops.build_native_ops()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def exchanged(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"and something else")


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def writable(path: Path) -> None:
    path.chmod(0o777)


@pytest.mark.parametrize("damage", [half, empty, exchanged, linked, writable])
def test_damaged_library_is_built_again(damage, filled, monkeypatch):
    name, loaded = filled.name, []
    damage(filled)
    load = library.ctypes.CDLL
    monkeypatch.setattr(
        library.ctypes, "CDLL", lambda path: (loaded.append(Path(path).read_bytes()), load(path))[1]
    )
    path = ops.build_native_ops()
    assert path.stat().st_mode & 0o777 == 0o700 and not path.is_symlink()
    assert loaded == [path.read_bytes()] and path.name == library._name_of(loaded[0])
    assert name.split("-")[1] == path.name.split("-")[1]


def test_whole_library_is_not_built_again(filled, monkeypatch):
    monkeypatch.setattr(library.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert ops.build_native_ops() == filled


def no_place_to_write(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")


def no_compiler(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def no_execution(monkeypatch) -> None:
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(library.ctypes, "CDLL", refuse)


@pytest.mark.parametrize("lack", [no_place_to_write, no_compiler, no_execution])
@torch.no_grad()
def test_without_a_library_plain_torch_computes_after_one_warning(lack, cache, monkeypatch, recwarn):
    plain = awake(VisualRWKVForCausalLM(text_config(7)))
    ids = torch.randint(1, 320, (1, 6), generator=torch.Generator().manual_seed(0))
    expected, _ = tokens_of(plain, ids)
    lack(monkeypatch)
    recwarn.clear()
    model = accelerate_on_cpu(awake(VisualRWKVForCausalLM(text_config(7))))
    assert torch.equal(tokens_of(model, ids)[0], expected)
    (said,) = [item for item in recwarn if "plain torch" in str(item.message)]
    assert issubclass(said.category, RuntimeWarning)


FORK = """
import os, sys, torch
from visualrwkv_hf import kernel_backend, wkv7
from visualrwkv_hf.cpu import ops

torch.set_num_threads(2)
x = torch.rand(1, 5, 8, 16)
weight = torch.rand(512, 64)

def compute():
    with torch.no_grad(), kernel_backend("native"):
        return wkv7(x, -x, x, x, -x, x)[0], ops.linear(torch.ones(1, 64), weight)

expected = compute()
child = os.fork()
if not child:
    same = all(torch.equal(found, before) for found, before in zip(compute(), expected))
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_child_of_a_fork_computes(filled):
    """OpenMP's threads do not survive a fork, and a child that waits for them hangs."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)], timeout=PATIENCE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- the C code itself -------------------------------------------------------------------------------------

HARNESS = Path(__file__).with_name("fuzz_native_ops.c")
SANITIZERS = [
    "-O1",
    "-g",
    "-std=gnu11",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-pthread",
    "-DSTANDALONE",
]


OLD_X86 = pytest.param(
    ["-march=x86-64-v2"],  # SSSE3 and no AVX
    marks=pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="is for x86"),
)


@pytest.mark.parametrize(
    "for_this_cpu", [["-march=native"], OLD_X86, []], ids=["this CPU", "old x86", "any CPU"]
)
def test_random_arguments_under_sanitizers(for_this_cpu, tmp_path):
    """Accesses outside of exactly allocated arrays, and undefined behaviour. README.md has the longer run by hand."""
    compiler = next(filter(None, map(shutil.which, library.COMPILERS)))
    program = tmp_path / "fuzz"
    probe = [compiler, "-fsanitize=address,undefined", "-x", "c", "-", "-o", str(program)]
    if subprocess.run(probe, input="int main(void) { return 0; }", text=True, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    command = [compiler, *SANITIZERS, *for_this_cpu, str(HARNESS), "-o", str(program), "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run([program, "600"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "600 inputs\n", done.stderr
