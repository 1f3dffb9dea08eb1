"""Builds the C++ room against the torch that is installed. Without a compiler the package installs all the same."""

import json
import os
import platform
import sys
from pathlib import Path

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "dft_kernels: torch must be installed first and be visible to this build, got no torch. Run "
        "'pip install torch', then 'pip install --no-build-isolation -e .'."
    )
from setuptools import setup

HERE = Path(__file__).parent
STAMP = HERE / "dft_kernels" / "_build.json"  # what the extension was built against, or why there is none
SOURCES = ["csrc/bindings.cpp", "csrc/memory.cpp", "csrc/ops.cpp", "csrc/step_cpu.cpp"]
HEADERS = [str(path) for pattern in ("*.h", "*.inc") for path in sorted((HERE / "csrc").glob(pattern))]

# One source, compiled for each instruction set, chosen at run time: a binary built on one x86-64 runs on any.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512")
    ]
# -fno-math-errno, -fno-trapping-math let selects become vector selects; results and NaN stay as IEEE has them
KERNEL_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
SANITIZE = ["-fsanitize=address,undefined", "-g1"] if os.environ.get("DFT_KERNELS_SANITIZE") == "1" else []


class OptionalBuild(BuildExtension):
    """Builds the extension, or says in one line why it could not and leaves that in the stamp."""

    def run(self):
        stamp = {"torch": torch.__version__, "cuda": torch.version.cuda, "built": True, "reason": None}
        try:
            super().run()
        except Exception as error:  # a missing or broken compiler must not cost the user the reference backend
            if os.environ.get("DFT_KERNELS_REQUIRE_EXTENSION") == "1":
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            stamp.update(built=False, reason=reason)
            print(f"dft_kernels: the C++ extension was not built ({reason}); install a C++ compiler and repeat.")
        STAMP.write_text(json.dumps(stamp, indent=1) + "\n")

    def build_extensions(self):
        for name, flags in INSTRUCTION_SETS.items():
            options = {
                "output_dir": self.build_temp,
                "depends": HEADERS,
                "extra_postargs": [*KERNEL_FLAGS, *flags, *SANITIZE],
            }
            extension.extra_objects += self.compiler.compile([f"csrc/rows_{name}.cpp"], **options)
        super().build_extensions()


extension = CppExtension(
    "dft_kernels._C",
    SOURCES,
    depends=HEADERS,
    extra_compile_args=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-fopenmp", *SANITIZE],
    extra_link_args=["-fopenmp", *SANITIZE],
)
extension.optional = True
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(ext_modules=[extension], cmdclass={"build_ext": OptionalBuild})
