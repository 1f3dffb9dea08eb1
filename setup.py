"""Builds the C++ room against the torch that is installed. Without a compiler the package installs all the same."""

import json
import os
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
SOURCES = ["csrc/build_info.cpp", "csrc/ops.cpp"]


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


extension = CppExtension(
    "dft_kernels._C",
    SOURCES,
    extra_compile_args=["-O2", "-g0", "-fvisibility=hidden"],
)
extension.optional = True
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
setup(ext_modules=[extension], cmdclass={"build_ext": OptionalBuild})
