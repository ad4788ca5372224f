"""Every machine gets a device that works, and a wrong choice costs one sentence.

What a machine has (compilers, zig, OpenCL, CC and DEV) is looked up once per process, so most
tests start a process on a machine made for them: its own PATH, its own environment.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad.device import ALL_DEVICES
from tinygrad.helpers import DEV

import tinygpt.device as device
from tinygpt.config import InputError
from tinygpt.device import available_devices, select_device

Machine = Callable[..., subprocess.CompletedProcess[str]]

PACKAGE = Path(device.__file__).parent
ZIG_CLANG = PACKAGE / "zig-clang.sh"
ZIG = importlib.util.find_spec("ziglang")

IMPORT = "import os, sys\nimport tinygpt.device as device\n"
PREPARE = IMPORT + "device.prepare()\n"
CHOICE = PREPARE + "print(os.environ['CC']); print(device.choose_compiler().version)\n"
NO_ZIG = "import sys; sys.modules['ziglang'] = None\n"
COMMAND = "import sys; sys.argv = ['-m']\n"  # what Python sets while `-m` looks up the module
COMPUTE = """
import numpy as np
from tinygrad import Tensor
a, b = np.random.default_rng(0).integers(-99, 99, (2, 65, 65), dtype=np.int32)
assert ((Tensor(a) @ Tensor(b)).numpy() == a @ b).all()
x = np.linspace(-3, 3, 1000, dtype=np.float32)
# values below 6: a few roundings of a float32 there, 5e-7 each
np.testing.assert_allclose((Tensor(x).sin() + Tensor(x).exp().sqrt()).numpy(),
                           np.sin(x) + np.sqrt(np.exp(x)), rtol=0, atol=2e-6)
print("computed on", device.device_name())
"""

needs_zig = pytest.mark.skipif(ZIG is None, reason="the ziglang package is not installed")
needs_sh = pytest.mark.skipif(os.name != "posix", reason="the compilers made here are sh scripts")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with only tmp_path/bin on PATH: `machine(code, CC="gcc")` runs Python there.

    DEV is CPU unless it is given: without, tinygrad looks for half a second for other devices. The
    linker is there, because PoCL, OpenCL for CPUs, ends the process where it finds none.
    """
    (tmp_path / "bin").mkdir()
    if linker := shutil.which("ld"):
        (tmp_path / "bin/ld").symlink_to(linker)
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "DEV", "TINYGPT_ZIG")}
    given = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(PACKAGE.parent), "DEV": "CPU"}

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=kept | given | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def printed(run: subprocess.CompletedProcess[str]) -> list[str]:
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def refused(run: subprocess.CompletedProcess[str]) -> str:
    """The sentence of the InputError that ended the process."""
    assert run.returncode != 0, run.stdout
    error, _, sentence = run.stderr.strip().splitlines()[-1].partition(": ")
    assert error == "tinygpt.config.InputError"
    return sentence


def make_program(path: Path, answer: str, status: int = 0) -> str:
    """A program that answers the question for clang's version, and cannot compile."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n[ $1 = -E ] || exit 7\necho '{answer}'\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def make_gcc(path: Path) -> str:
    return make_program(path, "__clang_major__ __clang_minor__ __clang_patchlevel__")


# Which compiler


@needs_sh
@pytest.mark.skipif(sys.platform == "darwin", reason="on macOS it is Xcode's clang")
def test_the_newest_clang_on_path_is_chosen(machine: Machine, tmp_path: Path) -> None:
    make_program(tmp_path / "a" / "clang", "14 0 6")
    make_program(tmp_path / "a" / "clang-9", "9 0 1")  # as text, 9 comes after 19
    newest = make_program(tmp_path / "b" / "clang-19", "19 1 7")
    make_program(tmp_path / "b" / "clang-format-19", "99 0 0")
    make_program(tmp_path / "b" / "clang-22", "22 0 0", status=1)
    make_gcc(tmp_path / "b" / "clang-20")
    (tmp_path / "b" / "clang-21").symlink_to("gone")
    run = machine(CHOICE, PATH=f"{tmp_path}/missing:{tmp_path}/a:{tmp_path}/b")
    assert printed(run) == [newest, "19.1.7"]
    assert run.stderr == ""


@needs_sh
def test_cc_comes_before_a_newer_clang(machine: Machine, tmp_path: Path) -> None:
    make_program(tmp_path / "bin" / "clang", "19 1 7")
    mine = make_program(tmp_path / "my clang", "3 0 0")
    run = machine(CHOICE, CC=mine)
    assert printed(run) == [mine, "3.0.0"]
    assert run.stderr == ""


@needs_sh
@pytest.mark.parametrize("cc", ["gcc", "ccache clang", "/no/such/clang"])
def test_a_cc_that_is_no_clang_costs_one_sentence(
    machine: Machine, tmp_path: Path, cc: str
) -> None:
    make_gcc(tmp_path / "bin" / "gcc")
    clang = make_program(tmp_path / "bin" / "clang", "19 1 7")
    run = machine(CHOICE, CC=cc)
    assert printed(run) == [clang, "19.1.7"]
    assert len(run.stderr.splitlines()) == 1
    assert f"CC={cc} " in run.stderr and clang in run.stderr


@needs_sh
@pytest.mark.parametrize("variables", [{"CC": ""}, {"CC": "gcc", "DEV": "PYTHON"}])
def test_a_cc_that_does_not_matter_is_passed_over(
    machine: Machine, tmp_path: Path, variables: dict[str, str]
) -> None:
    clang = make_program(tmp_path / "bin" / "clang", "19 1 7")
    run = machine(CHOICE, **variables)
    assert printed(run) == [clang, "19.1.7"]
    assert run.stderr == ""


@needs_sh
def test_tinygrad_and_child_processes_use_the_choice(machine: Machine, tmp_path: Path) -> None:
    """Even where tinygrad has looked for its compiler before: it keeps what it has read."""
    clang = make_program(tmp_path / "bin" / "clang-19", "19 1 7")
    look = "from tinygrad.helpers import getenv; print(getenv('CC', 'clang'), flush=True)\n"
    child = f"import subprocess; subprocess.run([sys.executable, '-c', {look!r}])\n"
    assert printed(machine(look + PREPARE + look + child)) == ["clang", clang, clang]


@needs_sh
def test_a_clang_that_cannot_compile_is_one_sentence(machine: Machine, tmp_path: Path) -> None:
    """Even where every kernel needed so far is in tinygrad's cache."""
    code, cache = PREPARE + "device.select_device('cpu')", str(tmp_path / "cache.db")
    if working := device.choose_compiler():
        zig = os.environ.get("TINYGPT_ZIG", "")
        printed(machine(code, CACHEDB=cache, CC=working.program, TINYGPT_ZIG=zig))
    broken = make_program(tmp_path / "bin" / "clang", "19 1 7")
    sentence = refused(machine(code, CACHEDB=cache))
    assert sentence.startswith(f"device CPU does not work here ({broken} ended with status 7)")
    assert "PYTHON" in sentence


# No clang: zig, or a sentence


@needs_zig
def test_zig_compiles_where_there_is_no_clang(machine: Machine, tmp_path: Path) -> None:
    """Without a home or a temporary folder to write to, and with a blank in every path."""
    assert ZIG and ZIG.origin
    folder = tmp_path / "with a blank"
    folder.mkdir()
    (folder / "tinygpt").symlink_to(PACKAGE)
    (folder / "ziglang").symlink_to(Path(ZIG.origin).parent)
    nowhere = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), "/no/such/folder")
    code = PREPARE + "device.select_device('cpu')" + COMPUTE
    run = machine(code, PYTHONPATH=str(folder), CACHELEVEL="0", **nowhere)
    assert printed(run)[0].startswith("computed on CPU (clang ")
    assert run.stderr == ""


@needs_zig
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
@pytest.mark.parametrize("dev", ["CPU::x86_64,x86-64-v2", "CPU:CLANG:x86_64,native,-avx512f"])
def test_zig_compiles_for_a_named_processor(machine: Machine, dev: str) -> None:
    run = machine(PREPARE + "print(device.select_device(None))" + COMPUTE, DEV=dev, CACHELEVEL="0")
    assert printed(run)[0] == dev
    assert printed(run)[1].startswith(f"computed on {dev} (clang ")


def zig_clang(source: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Compile as tinygrad does: the source comes on standard input, the object leaves on output."""
    assert ZIG and ZIG.origin
    return subprocess.run(
        [ZIG_CLANG, "-c", "-x", "c", "-O2", "-ffreestanding", *arguments, "-", "-o", "-"],
        input=source.encode(),
        capture_output=True,
        env={"TINYGPT_ZIG": str(Path(ZIG.origin).with_name("zig"))},
        timeout=240,
    )


@needs_zig
@pytest.mark.parametrize(
    ("target", "options", "machine_code"),
    [
        ("x86_64", ["-march=znver3"], 62),  # ELF's numbers for the processors, e_machine
        ("arm64", ["-ffixed-x18", "-mcpu=apple-m1"], 183),
        ("riscv64", ["-march=rv64g"], 243),
    ],
)
def test_zig_compiles_for_every_processor_that_tinygrad_knows(
    target: str, options: list[str], machine_code: int
) -> None:
    source = "void f(float* a) { for (int i = 0; i < 64; i++) a[i] *= 2; }"
    run = zig_clang(source, f"--target={target}-none-unknown-elf", *options)
    assert run.returncode == 0, run.stderr
    assert run.stdout[:4] == b"\x7fELF"
    assert int.from_bytes(run.stdout[18:20], "little") == machine_code


@needs_zig
def test_zig_passes_errors_on() -> None:
    run = zig_clang("int x = ;")
    assert run.returncode == 1
    assert run.stdout == b""
    assert b"expected expression" in run.stderr


@needs_zig
def test_zig_compiles_several_kernels_at_once() -> None:
    sources = [f"int f(int x) {{ return x * {n} + {n * n}; }}" for n in range(8)]
    alone = [zig_clang(source).stdout for source in sources]
    with ThreadPoolExecutor(8) as pool:
        together = [run.stdout for run in pool.map(zig_clang, sources)]
    assert together == alone
    assert len(set(alone)) == len(sources)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permission")
def test_the_zig_script_may_be_executed() -> None:
    assert ZIG_CLANG.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("variables", [{"DEV": ""}, {"DEV": "cpu:llvm"}, {"CC": "gcc"}])
def test_no_compiler_is_one_sentence_that_names_the_fixes(
    machine: Machine, variables: dict[str, str]
) -> None:
    code = NO_ZIG + PREPARE + "assert device.Device.DEFAULT != 'CPU'; device.select_device('cpu')"
    sentence = refused(machine(code, **variables))
    for fix in ("pip install ziglang", "install clang", "set CC", "available here: ", "PYTHON"):
        assert fix in sentence


def test_another_device_needs_no_compiler(machine: Machine) -> None:
    code = NO_ZIG + PREPARE + "print(device.select_device(None))"
    assert printed(machine(code, DEV="python")) == ["PYTHON"]


def test_a_command_may_still_choose_another_device(machine: Machine) -> None:
    """Its flags are read after the import, so the import must not end it."""
    code = COMMAND + NO_ZIG + PREPARE
    for dev in ("CPU", "no:such:thing:at:all"):
        run = machine(code + "print(device.select_device('python'))", DEV=dev)
        assert printed(run) == ["PYTHON"]
    assert "needs clang" in refused(machine(code + "device.select_device(None)", DEV="CPU"))


# Names of devices


@pytest.mark.parametrize(
    ("dev", "name"),
    [
        ("cpu", "CPU"),
        ("GPU", "CL"),
        ("gpu:0", "CL"),
        ("cpu:llvm", "CPU:LLVM"),
        ("Cpu::x86_64,znver2,-avx2", "CPU::x86_64,znver2,-avx2"),
        ("USB+amd:llvm", "USB+AMD:LLVM"),
        ("gpu; cpu:llvm", "CL;CPU:LLVM"),
        ("null:cuda:sm_90", "NULL:CUDA:sm_90"),
    ],
)
def test_names_are_those_of_tinygrad_in_any_case_and_gpu(dev: str, name: str) -> None:
    assert ";".join(repr(target) for target in device._parse(dev)) == name


@pytest.mark.parametrize("before", ["", "import tinygrad\n"])
def test_dev_is_made_right_for_everyone_and_nothing_is_opened(
    machine: Machine, before: str
) -> None:
    look = "print(os.environ['DEV'], device.DEV, device.Device._opened_devices)"
    assert printed(machine(before + PREPARE + look, DEV="gpu:0")) == ["CL CL set()"]


@given(st.sampled_from(["CPU", "CL", "CUDA", "PYTHON", "CPU:LLVM", "NULL:PTX:sm_90"]), st.data())
def test_a_name_in_any_case_is_the_same_device(name: str, data: st.DataObject) -> None:
    head, colon, architecture = name.partition(":sm_")  # tinygrad leaves the architecture alone
    flips = data.draw(st.lists(st.booleans(), min_size=len(head), max_size=len(head)))
    typed = "".join(c.lower() if flip else c for c, flip in zip(head, flips, strict=True))
    assert device._parse(typed + colon + architecture) == device._parse(name)
    assert device._parse(repr(device._parse(name)[0])) == device._parse(name)


@pytest.mark.parametrize("name", ["FOO", "", "disk", "cpu;foo", "c p u", "a:b:c:d", "a+b+c", "é"])
def test_an_unknown_device_is_one_sentence_and_changes_nothing(name: str) -> None:
    before = repr(DEV), os.environ.get("DEV")
    with pytest.raises(InputError) as error:
        select_device(name)
    assert repr(name) in str(error.value) or "cannot be read" in str(error.value)
    assert "\n" not in str(error.value)
    assert (repr(DEV), os.environ.get("DEV")) == before


def test_an_unknown_dev_says_what_is_available(machine: Machine) -> None:
    sentence = refused(machine(PREPARE, DEV="FOO"))
    assert sentence.startswith("'FOO' is not a device")
    assert sentence.endswith("available here: " + ", ".join(available_devices()))


def test_after_a_refusal_the_right_dev_can_be_set(machine: Machine) -> None:
    """As in a notebook: the same process, tinygrad imported with the wrong name."""
    code = "import os, tinygrad\ntry:\n    import tinygpt.device as device\n    device.prepare()\n"
    code += "except ValueError:\n    os.environ['DEV'] = 'python'\n"
    code += "import tinygpt.device as device\ndevice.prepare()\nprint(device.Device.DEFAULT)"
    assert printed(machine(code, DEV="FOO")) == ["PYTHON"]


def test_a_number_is_refused_with_the_name_to_use() -> None:
    with pytest.raises(InputError, match="'cuda:1' has a number, .* use CUDA$"):
        select_device("cuda:1")


def test_a_device_in_the_old_style_is_one_sentence(machine: Machine) -> None:
    code = COMMAND + NO_ZIG + PREPARE + "device.select_device(None)"
    assert "use DEV=PYTHON instead" in refused(machine(code, DEV="", PYTHON="1"))


# Opening


def test_a_missing_device_says_why_and_what_is_available() -> None:
    missing = next(name for name in ALL_DEVICES if name not in available_devices())
    before = repr(DEV), os.environ.get("DEV")
    with pytest.raises(InputError) as error:
        select_device(missing.lower())
    assert str(error.value).startswith(f"device {missing} does not work here (")
    assert str(error.value).endswith("available here: " + ", ".join(available_devices()))
    assert (repr(DEV), os.environ.get("DEV")) == before


def test_an_unknown_renderer_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"device PYTHON:FOO does not work here \(.*'FOO'\)"):
        select_device("python:foo")


def test_the_selected_device_computes_here_and_in_children(machine: Machine) -> None:
    look = "from tinygrad import Device; print(Device.DEFAULT)"
    code = PREPARE + "print(device.select_device('python'), os.environ['DEV'], flush=True)\n"
    code += f"import subprocess; subprocess.run([sys.executable, '-c', {look!r}])\n{look}"
    assert printed(machine(code, DEV="null")) == ["PYTHON PYTHON", "PYTHON", "PYTHON"]


def test_every_available_device_can_be_selected(machine: Machine) -> None:
    names = available_devices()
    assert names[-1] == "PYTHON" and len(set(names)) == len(names)
    code = "\n".join(f"print(device.select_device({name.lower()!r}))" for name in names)
    assert printed(machine(PREPARE + code, DEV="null", PATH=os.environ["PATH"])) == names


def test_a_device_that_computes_wrong_is_refused(machine: Machine) -> None:
    """As WEBGPU without a driver: it opens, runs, and leaves the output as it was."""
    code = PREPARE + "from tinygrad.runtime.ops_python import PythonProgram\n"
    code += "PythonProgram.__call__ = lambda *arguments, **options: 0.0\n"
    sentence = refused(machine(code + "device.select_device('python')", DEV="null"))
    assert sentence.startswith("device PYTHON does not work here (twice 1, 2, 3 came out as ")


# The default


FAKE_OPENCL = """
from tinygrad.runtime.autogen import opencl as cl
kinds = [getattr(cl, f"CL_DEVICE_TYPE_{kind}") for kind in ("DEFAULT", *KINDS)]
cl.clGetPlatformIDs = lambda *arguments: 0
def clGetDeviceIDs(platform, kind, entries, devices, count):
    count.value = int(kind in kinds)
    return 0 if kind in kinds else cl.CL_DEVICE_NOT_FOUND
cl.clGetDeviceIDs = clGetDeviceIDs
"""


def fake_opencl(*kinds: str) -> str:
    """Code that makes tinygrad's OpenCL library report devices of these kinds and no others."""
    return f"KINDS = {kinds}{FAKE_OPENCL}"


OPENED = """
from tinygrad import Device
open_device = type(Device).__getitem__
type(Device).__getitem__ = lambda _, name: name == "CL" or open_device(Device, name)
"""
SEE_DEFAULT = PREPARE + "print(os.environ['DEV'], repr(device.DEV), device.Device._opened_devices)"


@needs_sh
def test_opencl_on_a_cpu_is_not_the_default(machine: Machine, tmp_path: Path) -> None:
    make_program(tmp_path / "bin" / "clang", "19 1 7")
    if set(available_devices()) & set(ALL_DEVICES[: ALL_DEVICES.index("CL")]):
        pytest.skip("this machine has a GPU that tinygrad prefers to OpenCL")
    assert printed(machine(fake_opencl("CPU") + SEE_DEFAULT, DEV="")) == ["CPU CPU set()"]


@needs_sh
@pytest.mark.parametrize("kinds", [("GPU",), ("GPU", "CPU"), ("ACCELERATOR",)])
def test_opencl_on_a_real_device_is_left_to_tinygrad(
    machine: Machine, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    make_program(tmp_path / "bin" / "clang", "19 1 7")
    assert printed(machine(fake_opencl(*kinds) + OPENED + SEE_DEFAULT, DEV="")) == ["  set()"]


def test_no_driver_is_loaded_for_a_gpu_that_is_not_there(machine: Machine) -> None:
    """That takes longer than all the rest of an import; and none that is there is passed over."""
    absent = [name for name in ALL_DEVICES if device._absent(name)]
    assert not set(absent) & set(available_devices())
    names = [f"tinygrad.runtime.ops_{name.lower()}" for name in absent]
    run = machine(PREPARE + f"print([name for name in {names} if name in sys.modules])", DEV="")
    assert printed(run) == ["[]"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /sys")
def test_a_gpu_is_absent_without_node_and_vendor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("MOCKGPU", "REMOTE"):
        monkeypatch.delenv(variable, raising=False)
    node = tmp_path / "node"
    monkeypatch.setattr(device, "GPUS", {"NV": (str(node), {"no vendor's number"})})
    assert device._absent("NV") and not device._absent("CL")  # of CL nothing is known
    node.touch()
    assert not device._absent("NV")
    node.unlink()
    monkeypatch.setenv("REMOTE", "another machine")
    assert not device._absent("NV")


WIDE = "x86_64,native,prefer-vector-width=512"


@needs_sh
@pytest.mark.parametrize(
    "dev, avx512, seen",
    [
        ("", "1", f"CPU CPU::{WIDE} CPU (clang 19.1.7)"),
        ("cpu", "1", f"CPU CPU::{WIDE} CPU (clang 19.1.7)"),
        ("CPU:CLANG", "1", f"CPU:CLANG CPU:CLANG:{WIDE} CPU:CLANG (clang 19.1.7)"),
        ("CPU", "__AVX512F__", "CPU CPU CPU (clang 19.1.7)"),
        ("CPU:LLVM", "1", "CPU:LLVM CPU:LLVM CPU:LLVM"),
        ("CPU::x86_64,znver3", "1", "CPU::x86_64,znver3 CPU::x86_64,znver3"),
    ],
)
def test_clang_fills_the_registers_of_avx512(
    machine: Machine, tmp_path: Path, dev: str, avx512: str, seen: str
) -> None:
    """... unless DEV names an architecture; the device keeps its name."""
    make_program(tmp_path / "bin" / "clang", f"19 1 7 {avx512}")
    if dev == "" and available_devices()[0] != "CPU":
        pytest.skip("the CPU is not this machine's default device")
    code = PREPARE + "print(os.environ['DEV'], repr(device.DEV), device.device_name())"
    assert printed(machine(fake_opencl() + code, DEV=dev))[0].startswith(seen)


@needs_sh
def test_dev_wins_over_the_default(machine: Machine, tmp_path: Path) -> None:
    make_program(tmp_path / "bin" / "clang", "19 1 7")
    assert printed(machine(fake_opencl("CPU") + SEE_DEFAULT, DEV="gpu")) == ["CL CL set()"]


@needs_sh
def test_opencl_on_a_cpu_is_the_default_where_nothing_can_compile_for_the_cpu(
    machine: Machine,
) -> None:
    if "CL" not in available_devices():
        pytest.skip("no OpenCL here")
    run = machine(NO_ZIG + PREPARE + "print(device.select_device(None))", DEV="")
    assert printed(run) == available_devices()[:1]  # CL, or a GPU that tinygrad prefers
