"""Builds the extension modules against the installed torch. Without a compiler the package installs all the same.
What is built requires this torch up to its patch release: `pip` says so after an upgrade, and so does the first loss.

    dft_kernels._C     the CPU kernels; needs a C++ compiler
    dft_kernels._cuda  the CUDA kernels; needs nvcc as well

DFT_KERNELS_CPU=0 or DFT_KERNELS_CUDA=0 leaves that module out, =1 makes its failure an error. Unset, the first is built
where it can be, the second where torch has CUDA too. The CUDA kernels alone, say for another Python:

    DFT_KERNELS_CPU=0 DFT_KERNELS_CUDA=1 python setup.py build_ext --inplace

TORCH_CUDA_ARCH_LIST chooses the GPUs, CUDA_HOME the toolkit, MAX_JOBS the number of compilers at a time. The product
with exponentials takes CUTLASS's headers: of the wheel nvidia-cutlass, or of the folder that DFT_KERNELS_CUTLASS names.
CUDA objects include nothing of torch and are kept in build/cuda: another torch or Python compiles the bindings alone.
DFT_KERNELS_SANITIZE=1 builds the CPU kernels under ASan and UBSan.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

OLDEST_TORCH = (2, 11)  # of dft_kernels/__init__.py too
OTHERS = ["numpy>=1.26", "packaging>=23"]
if set(sys.argv[1:]) & {"sdist", "egg_info"}:  # what the sources ask for, whatever is installed
    setup(install_requires=["torch>={}.{}".format(*OLDEST_TORCH), *OTHERS])
    sys.exit()

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "dft_kernels: torch must be installed first and be visible to this build, got no torch. Run 'pip install torch "
        "setuptools wheel ninja', then repeat with 'pip install --no-build-isolation'."
    )
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
if TORCH < OLDEST_TORCH:
    sys.exit(
        "dft_kernels: torch must be {}.{} or newer, got {}. Run pip install --upgrade torch, then repeat.".format(
            *OLDEST_TORCH, torch.__version__
        )
    )

HERE = Path(__file__).resolve().parent
STAMP = HERE / "dft_kernels" / "_build.json"  # what the extensions were built against, or why there are none
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("bindings", "gathered", "memory", "ops", "scores", "step")]
KERNELS = [
    f"csrc/cuda/{name}.cu"
    for name in (
        *("columns", "exponentials", "labels", "lean", "lean_entropy", "lean_jensen_shannon", "lean_kl", "lean_skew"),
        *("rows", "scaling"),
    )
]
READ = runpy.run_path(str(HERE / "dft_kernels" / "backends" / "sources.py"))  # the package is not to be imported yet
JOBS = int(os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1)))

# csrc/cpu/rows.cpp is compiled for each instruction set, one is chosen at run time: the binary runs on any x86-64.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512")
    ]
# -fno-math-errno and -fno-trapping-math allow vector selects; results and NaN are those of IEEE arithmetic
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
ON_CUTLASS = {"csrc/cuda/exponentials.cu": "9.0a"}  # sources that take its headers, and what they are for
OLDEST_ARCHITECTURE, OLDEST_NVCC = (7, 5), (12, 0)
COMPILED = HERE / "build" / "cuda"  # objects by what went into them


class BuildError(Exception):
    """Why an extension module cannot be built, in one line that says what to do."""


def choice(variable):
    """False, True or None: 0, 1 or unset."""
    value = os.environ.get(variable) or None
    if value not in (None, "0", "1"):
        sys.exit(f"dft_kernels: {variable} must be 0, 1 or unset, got {value!r}. Correct it.")
    return None if value is None else value == "1"


def cutlass():
    """The folder of CUTLASS's headers, None where there is none."""
    asked = os.environ.get("DFT_KERNELS_CUTLASS")
    if asked:
        found = [path for path in (Path(asked), Path(asked) / "include") if (path / "cutlass" / "cutlass.h").is_file()]
        if not found:
            sys.exit(
                "dft_kernels: DFT_KERNELS_CUTLASS must be a folder of CUTLASS (include/cutlass/cutlass.h), got "
                f"{asked}. Correct it, or leave it out and pip install --no-deps nvidia-cutlass."
            )
        return found[0]
    wheel = importlib.util.find_spec("cutlass_library")
    headers = Path(wheel.origin).parent / "source" / "include" if wheel and wheel.origin else None
    return headers if headers and (headers / "cutlass" / "cutlass.h").is_file() else None


def read_stamp():
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


class Nvcc:
    """The CUDA compiler and what it is to compile for."""

    def __init__(self):
        self.path = self.find()
        self.said = self.run("--version")
        found = re.search(r"release (\d+)\.(\d+)", self.said)
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
        self.cutlass = cutlass()
        read = [path for path in READ["sources"](HERE, "_cuda") if path.suffix != ".cpp"]
        # of CUTLASS, thousands of files, the version alone: who edits its headers deletes build/cuda
        read += [self.cutlass / "cutlass" / "version.h"] if self.cutlass else []
        flags = [os.environ.get(name) for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")]
        self.dry = self.dry_run()
        digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in read)
        self.inputs = [self.said, self.host(), *flags, *digests]

    @staticmethod
    def find():
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        paths = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        for path in paths:
            if path and Path(path).is_file():
                return Path(path)
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        raise BuildError(
            f"there is no nvcc {where}. Install the CUDA toolkit of torch's version, or set CUDA_HOME to it."
        )

    def run(self, *arguments):
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if re.search("error|fatal", line, re.I)]
            first = (lines or [f"exit status {done.returncode}"])[0].strip()
            remedy = "Set NVCC_PREPEND_FLAGS='-ccbin g++-N' to a host compiler that it takes." if "GNU" in first else ""
            raise BuildError(f"nvcc failed: {first}. {remedy}".strip())
        return done.stdout + done.stderr

    def dry_run(self):
        """The commands that nvcc would run, a line each."""
        done = subprocess.run([self.path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        return done.stderr + done.stdout

    def host(self):
        """What the host compiler that nvcc takes says of itself: an upgrade changes it in place."""
        preprocesses = re.search(r"^#\$ (.+?) -.* -E -x c\+\+ ", self.dry, re.M)
        compiler = shlex.split(preprocesses[1])[0] if preprocesses else "gcc"
        if shutil.which(compiler) is None:  # nvcc says so where it has to compile
            return None
        return compiler, subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout

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

    def compile(self, source):
        """One source to one object with code for every architecture; kept, for none of it depends on torch."""
        flags, architectures = CUDA_FLAGS, self.architectures
        if self.cutlass and ON_CUTLASS.get(source) in architectures:
            flags, architectures = (
                [*flags, "-DNDEBUG", "-DDFT_CUTLASS", f"-isystem={self.cutlass}"],
                [ON_CUTLASS[source]],
            )
        codes = []
        for name in architectures:
            number = name.removesuffix("+PTX").replace(".", "")
            codes.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if name.endswith("+PTX"):
                codes.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        digest = hashlib.sha256(repr([*flags, *codes, *self.inputs]).encode()).hexdigest()
        kept = COMPILED / f"{Path(source).stem}-{digest[:16]}.o"
        print("dft_kernels: nvcc", shlex.join([*flags, *codes]), source, "(kept)" if kept.is_file() else "")
        if not kept.is_file():
            COMPILED.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f"{kept.name}.part")
            threads = min(max(1, JOBS // len(KERNELS)), len(codes))
            said = self.run(*flags, *codes, "--threads", str(threads), "-c", source, "-o", part)
            if said:  # warnings, and what flags of NVCC_APPEND_FLAGS ask for
                print(f"dft_kernels: nvcc of {source} said\n{said}")
            part.replace(kept)
        return str(kept)

    def libraries(self):
        """Linker flags for the static CUDA runtime, of the toolkit that nvcc itself uses (#$ TOP=... of a dry run)."""
        top = re.search(r"^#\$ TOP=(.+)$", self.dry, re.M)
        homes = [Path(top[1].strip())] if top else []
        homes.append(self.path.resolve().parent.parent)
        for folder in (home / name for home in homes for name in ("lib64", "lib", "targets/x86_64-linux/lib")):
            if (folder / "libcudart_static.a").is_file():
                return [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        raise BuildError(
            f"libcudart_static.a is not in the toolkit of {self.path}. Install the CUDA runtime's development files."
        )


class OptionalBuild(BuildExtension):
    """Builds each extension module, or says in one line why it could not and records that in the stamp."""

    def run(self):
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
        stamp = STAMP if self.inplace else Path(self.build_lib) / "dft_kernels" / STAMP.name
        before = read_stamp() if self.inplace else {}  # of a CPU part that is left as it is
        cpu, cuda = ({**versions, "sources": READ["digest"](HERE, name)} for name in ("_C", "_cuda"))
        kept = CPU is False and {name: before.get(name) for name in (*cpu, "built")} == {**cpu, "built": True}
        self.force = True  # a module that was built for another torch looks up to date
        self.cpu = {**cpu, "built": kept, "reason": None if kept else "DFT_KERNELS_CPU=0 at the build"}
        self.cuda = {**cuda, "built": False, "reason": "DFT_KERNELS_CUDA=0 at the build"}
        super().run()
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps({**self.cpu, "cuda_kernels": self.cuda}, indent=1) + "\n")

    def build_extensions(self):
        cpu, cuda = self.extensions
        self.compile_plainly = self.compiler.compile  # before torch replaces it
        if self.attempt(cuda, self.cuda, "DFT_KERNELS_CUDA", CUDA, self.compile_cuda) and torch.version.cuda:
            print(f"dft_kernels: the CUDA kernels were not built: {self.cuda['reason']}")
        if self.attempt(cpu, self.cpu, "DFT_KERNELS_CPU", CPU, self.compile_rows):
            reason = self.cpu["reason"]
            print(f"dft_kernels: the C++ extension was not built: {reason}")
        self.extensions = [each for each, wanted in ((cpu, CPU), (cuda, CUDA)) if wanted is not False]
        cpu.optional = cuda.optional = True  # one that failed is not there to be copied

    def attempt(self, extension, stamp, variable, wanted, compile_objects):
        """Whether the build of an extension failed. A missing or broken compiler must not cost the user the rest."""
        if wanted is False:
            return False
        try:
            compiler = shlex.split(get_cxx_compiler())[0]
            if shutil.which(compiler) is None:  # before minutes of nvcc
                raise BuildError(f"there is no C++ compiler {compiler}. Install one (apt-get install g++), or set CXX.")
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(JOBS) as pool:
                extension.extra_objects += compile_objects(extension, pool)
            self.extensions = [extension]
            super().build_extensions()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not isinstance(error, BuildError | OSError):  # what distutils and ninja raise is the whole command
                reason = f"{compiler} failed: pip install -v, or setup.py build_ext, shows its message."
            if wanted:
                sys.exit(f"dft_kernels: {variable}=1, but {reason}")
            stamp.update(built=False, reason=reason)
            return True
        stamp.update(built=True, reason=None)
        return False

    def compile_rows(self, extension, pool):
        def compile_for(name):
            return self.compile_plainly(
                ["csrc/cpu/rows.cpp"],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("DFT_ISA", name)],
                extra_postargs=[*KERNEL_FLAGS, *INSTRUCTION_SETS[name], *SANITIZE],
            )[0]

        return list(pool.map(compile_for, INSTRUCTION_SETS))

    def compile_cuda(self, extension, pool):
        if torch.version.cuda is None and not CUDA:
            raise BuildError(f"torch {torch.__version__} has no CUDA. Install a CUDA build of torch, then this again.")
        nvcc = Nvcc()
        extension.extra_link_args += nvcc.libraries()
        longest_first = sorted(KERNELS, key=lambda name: name not in ON_CUTLASS)
        objects = list(pool.map(nvcc.compile, longest_first))
        if nvcc.cutlass is None and "9.0a" in nvcc.architectures:
            print(
                "dft_kernels: the product with exponentials was left out, without CUTLASS's headers; pip install "
                "--no-deps nvidia-cutlass, or set DFT_KERNELS_CUTLASS, and repeat."
            )
        self.cuda.update(nvcc=".".join(map(str, nvcc.version)), architectures=nvcc.architectures)
        return objects


def extension(name, sources):
    return CppExtension(
        name,
        sources,
        depends=[str(path.relative_to(HERE)) for path in READ["sources"](HERE, name.removeprefix("dft_kernels."))],
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


CPU, CUDA = choice("DFT_KERNELS_CPU"), choice("DFT_KERNELS_CUDA")
setup(
    ext_modules=[
        extension("dft_kernels._C", SOURCES),
        extension("dft_kernels._cuda", ["csrc/cuda/bindings.cpp", "csrc/cuda/bind_exponentials.cpp"]),
    ],
    cmdclass={"build_ext": OptionalBuild},
    install_requires=["torch=={}.{}.*".format(*TORCH), *OTHERS],  # the C++ interface that this build is bound to
)
