"""Builds the compiled rooms against the torch that is installed. Without a compiler the package installs all the same.

DFT_KERNELS_CUDA=0 leaves the CUDA kernels out, =1 demands them; unset, they are built where torch has CUDA.
TORCH_CUDA_ARCH_LIST chooses their GPUs, CUDA_HOME the toolkit, MAX_JOBS the number of compilers at a time.
DFT_KERNELS_REQUIRE_EXTENSION=1 makes a failure of the CPU's room an error, DFT_KERNELS_SANITIZE=1 builds it sanitized.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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

HERE = Path(__file__).resolve().parent
STAMP = HERE / "dft_kernels" / "_build.json"  # what the extensions were built against, or why there are none
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("bindings", "memory", "ops", "step")]
KERNELS = [f"csrc/cuda/{name}.cu" for name in ("columns", "rows", "rows_cluster")]
HEADERS = [str(path) for pattern in ("*.h", "*.cuh") for path in sorted((HERE / "csrc").rglob(pattern))]
JOBS = int(os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1)))

# One source, compiled for each instruction set, chosen at run time: a binary built on one x86-64 runs on any.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512")
    ]
# -fno-math-errno, -fno-trapping-math let selects become vector selects; results and NaN stay as IEEE has them
KERNEL_FLAGS = [
    f"-I{HERE / 'csrc'}",
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
SANITIZE = ["-fsanitize=address,undefined", "-g1"] if os.environ.get("DFT_KERNELS_SANITIZE") == "1" else []

CUDA_FLAGS = ["-std=c++17", "--expt-relaxed-constexpr", "--extended-lambda", "-O3", "-Icsrc", "-Xcompiler", "-fPIC"]
DEFAULT_ARCHITECTURES = ["8.0", "9.0a", "10.0+PTX"]
OLDEST_ARCHITECTURE, OLDEST_NVCC = (7, 5), (12, 0)


class BuildError(Exception):
    """Why the CUDA kernels cannot be built, in one line that says what to do."""


class Nvcc:
    """The CUDA compiler and what it is to compile for."""

    def __init__(self):
        self.path = self.find()
        said = self.run("--version")
        found = re.search(r"release (\d+)\.(\d+)", said)
        if found is None:
            raise BuildError(f"{self.path} --version says nothing of a release. Set CUDA_HOME to a CUDA toolkit.")
        self.version = (int(found[1]), int(found[2]))
        shown = ".".join(map(str, self.version))
        if self.version < OLDEST_NVCC:
            least = ".".join(map(str, OLDEST_NVCC))
            raise BuildError(f"nvcc must be {least} or newer, {self.path} is {shown}. Install one, or set CUDA_HOME.")
        if torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) != self.version[0]:
            raise BuildError(
                f"nvcc must be of torch's CUDA {torch.version.cuda}, {self.path} is {shown}. Install that toolkit and "
                "set CUDA_HOME to it, or install a torch built for this one."
            )
        self.known = {f"{code[:-1]}.{code[-1]}" for code in re.findall(r"compute_(\d+)\b", self.run("--list-gpu-arch"))}
        self.architectures = self.choose()

    @staticmethod
    def find():
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        places = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        for place in places:
            if place and Path(place).is_file():
                return Path(place)
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        raise BuildError(
            f"there is no nvcc {where}. Install the CUDA toolkit of torch's version, or set CUDA_HOME to it."
        )

    def run(self, *arguments):
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
            first = (lines or [f"exit status {done.returncode}"])[0].strip()
            remedy = "Set NVCC_PREPEND_FLAGS='-ccbin g++-N' to a host compiler that it takes." if "GNU" in first else ""
            raise BuildError(f"nvcc failed: {first}. {remedy}".strip())
        return done.stdout

    def choose(self):
        """What TORCH_CUDA_ARCH_LIST asks for, in torch's own notation; else those of the default that nvcc knows."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if asked is None:
            return [name for name in DEFAULT_ARCHITECTURES if re.match(r"[\d.]+", name)[0] in self.known]
        chosen = re.split(r"[ ;,]+", asked.strip(" ;,"))
        for name in chosen:
            form = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
            if form is None:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 10.0+PTX, got {name!r}. Correct it, or "
                    "leave it out."
                )
            version = (int(form[1]), int(form[2]))
            if version < OLDEST_ARCHITECTURE or f"{form[1]}.{form[2]}" not in self.known:
                served = ", ".join(sorted((k for k in self.known), key=lambda k: [int(part) for part in k.split(".")]))
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST must hold GPUs from 7.5 on that nvcc compiles for ({served}), got {name}. "
                    "Take it out, or install a CUDA toolkit that knows it."
                )
        return chosen

    def compile(self, source, target):
        """One kernel file to one object with code for every architecture."""
        codes = []
        for name in self.architectures:
            number = name.removesuffix("+PTX").replace(".", "")
            codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if name.endswith("+PTX"):
                codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        print("dft_kernels: nvcc", shlex.join([*CUDA_FLAGS, *codes]), source)
        self.run(*CUDA_FLAGS, *codes, "--threads", str(min(JOBS, len(codes))), "-c", source, "-o", target)

    def libraries(self):
        """What links the CUDA runtime in, statically, from where nvcc itself looks (#$ TOP=... of a dry run)."""
        dry = subprocess.run([self.path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.M)
        homes = [Path(top[1].strip())] if top else []
        homes.append(self.path.resolve().parent.parent)
        for folder in (home / name for home in homes for name in ("lib64", "lib", "targets/x86_64-linux/lib")):
            if (folder / "libcudart_static.a").is_file():
                return [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        raise BuildError(
            f"libcudart_static.a is not in the toolkit of {self.path}. Install the CUDA runtime's development files."
        )


class OptionalBuild(BuildExtension):
    """Builds each extension, or says in one line why it could not and leaves that in the stamp."""

    def run(self):
        stamp = {"torch": torch.__version__, "cuda": torch.version.cuda, "built": True, "reason": None}
        self.cuda_kernels = {**stamp, "built": False, "reason": "DFT_KERNELS_CUDA=0 at the build"}
        try:
            super().run()
        except BuildError as error:  # what DFT_KERNELS_CUDA=1 demanded
            sys.exit(f"dft_kernels: DFT_KERNELS_CUDA=1, but {error}")
        except Exception as error:  # a missing or broken compiler must not cost the user the reference backend
            if os.environ.get("DFT_KERNELS_REQUIRE_EXTENSION") == "1":
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            stamp.update(built=False, reason=reason)
            print(f"dft_kernels: the C++ extension was not built ({reason}); install a C++ compiler and repeat.")
        STAMP.write_text(json.dumps({**stamp, "cuda_kernels": self.cuda_kernels}, indent=1) + "\n")

    def build_extensions(self):
        cpu, cuda = self.extensions
        self.build_cuda(cuda)
        for name, flags in INSTRUCTION_SETS.items():
            options = {
                "output_dir": str(Path(self.build_temp) / name),
                "macros": [("DFT_ISA", name)],
                "depends": HEADERS,
                "extra_postargs": [*KERNEL_FLAGS, *flags, *SANITIZE],
            }
            cpu.extra_objects += self.compiler.compile(["csrc/cpu/rows.cpp"], **options)
        self.extensions = [cpu]
        super().build_extensions()
        self.extensions = [cpu, cuda]

    def build_cuda(self, extension):
        wanted = os.environ.get("DFT_KERNELS_CUDA", "")
        try:
            if wanted == "0":
                return
            if wanted not in ("", "1"):
                raise BuildError(f"DFT_KERNELS_CUDA must be 0, 1 or unset, got {wanted!r}. Correct it.")
            if torch.version.cuda is None and wanted != "1":
                raise BuildError(
                    f"torch {torch.__version__} has no CUDA. Install a CUDA build of torch, then this again."
                )
            nvcc = Nvcc()
            extension.extra_link_args += nvcc.libraries()
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            objects = {source: str(Path(self.build_temp) / f"{Path(source).stem}.cu.o") for source in KERNELS}
            with ThreadPoolExecutor(JOBS) as pool:
                list(pool.map(nvcc.compile, objects, objects.values()))
            extension.extra_objects += objects.values()
            self.extensions = [extension]
            super().build_extensions()
            version = ".".join(map(str, nvcc.version))
            self.cuda_kernels.update(built=True, reason=None, nvcc=version, architectures=nvcc.architectures)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if wanted not in ("", "0"):
                raise BuildError(first) from error
            self.cuda_kernels.update(reason=first)
            if torch.version.cuda is not None:
                print(f"dft_kernels: the CUDA kernels were not built: {first}")


def extension(name, sources):
    built = CppExtension(
        name,
        sources,
        depends=HEADERS,
        extra_compile_args=[
            f"-I{HERE / 'csrc'}",
            "-std=c++20",
            "-O2",
            "-g0",
            "-fvisibility=hidden",
            "-fopenmp",
            *SANITIZE,
        ],
        extra_link_args=["-fopenmp", *SANITIZE],
    )
    built.optional = True
    return built


setup(
    ext_modules=[extension("dft_kernels._C", SOURCES), extension("dft_kernels._cuda", ["csrc/cuda/bindings.cpp"])],
    cmdclass={"build_ext": OptionalBuild},
)
