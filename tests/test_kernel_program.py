"""Every C++ kernel of the CPU in a program of its own, beside an oracle in C++; what the machine lacks is emulated."""

import emulation
import kernel_program
import pytest

FLAGS = ["-O1"]

# Compiling the kernels twice more takes most of a minute of a core.
pytestmark = [pytest.mark.broad, pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler on the path")]


def test_kernels_of_amx_and_avx512_bf16_are_right_on_emulated_instructions(tmp_path):
    program = kernel_program.build([emulation.compiler()], ["portable"], tmp_path, FLAGS, emulated=True)
    printed = kernel_program.run([program, *kernel_program.EMULATED])
    assert [line.partition(":")[0] for line in printed.splitlines()] == [*kernel_program.EMULATED, "all within their bounds"]
    with pytest.raises(RuntimeError, match=r"exit code 1: .*\nsve: this machine or this build does not have it"):
        kernel_program.run([program, "sve"])


def test_kernels_of_every_instruction_set_of_this_machine_are_right(tmp_path):
    cxx = [emulation.compiler()]
    program = kernel_program.build(cxx, kernel_program.setup_py().find_isas(cxx), tmp_path, FLAGS)
    assert "\nportable: " in "\n" + kernel_program.run([program])
