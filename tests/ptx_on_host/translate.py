"""PTX as C++: each entry a function that a thread of ptx.h runs, each instruction a statement of it.

It knows the instructions that csrc/cuda and triton_ops compile to for sm_90, and refuses any other by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

REGISTERS = {  # by the type that they are declared with
    "pred": "uint8_t", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t", "f32": "float", "f64": "double",
}  # fmt: skip
TYPES = {
    **REGISTERS,
    "pred": "bool",
    "b8": "uint8_t",
    **{f"{letter}{bits}": f"{sign}int{bits}_t" for bits in (8, 16, 32, 64) for letter, sign in (("s", ""), ("u", "u"))},
    "bf16": "Bf16",
    "f16": "F16",
}
SPECIAL = {
    "%tid.x": "threadIdx.x",
    **{f"%ctaid.{axis}": f"blockIdx.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"gridDim.{axis}" for axis in "xyz"},
    "%cluster_ctarank": "on_host::rank()",
    "%cluster_ctaid.x": "on_host::rank()",  # clusters lie along x
    "%cluster_ctaid.y": "0",
    "%cluster_ctaid.z": "0",
    "%cluster_nctarank": "on_host::machine().blocks",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # each the contrary of what is here

FUNCTIONS = ("not", "min", "max", "shl", "shr", "bfe", "bfi", "prmt", "ex2", "lg2", "rcp")

PLAIN: dict[str, Callable[..., str]] = {  # the result, of operands that have the instruction's type
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "add": lambda a, b: f"{a} + {b}",
    "sub": lambda a, b: f"{a} - {b}",
    "mul": lambda a, b: f"{a} * {b}",
    "mad": lambda a, b, c: f"{a} * {b} + {c}",
    "div": lambda a, b: f"{a} / {b}",
    "rem": lambda a, b: f"{a} % {b}",
    "fma": lambda a, b, c: f"std::fma({a}, {b}, {c})",
    "and": lambda a, b: f"{a} & {b}",
    "or": lambda a, b: f"{a} | {b}",
    "xor": lambda a, b: f"{a} ^ {b}",
    "neg": lambda a: f"-{a}",
    "abs": lambda a: f"std::fabs({a})",
    "copysign": lambda sign, of: f"std::copysign({of}, {sign})",
    **{name: lambda *of, name=name: f"{name}_of({', '.join(of)})" for name in FUNCTIONS},
}
# Of these, which change nothing here but for numbers below the normal ones
WAYS = {"lo", "rn", "approx", "full", "ftz", "to", "global", "param"}
CALLS = {  # what is of several threads, or goes on beside them: a function of the operands in their order
    "elect.sync": "elect",
    "mapa.shared::cluster.u32": "map_to",
    "mbarrier.init.shared::cta.b64": "barrier_init",
    "mbarrier.arrive.shared::cta.b64": "barrier_arrive",
    "mbarrier.arrive.shared::cluster.b64": "barrier_arrive",
    "mbarrier.arrive.expect_tx.shared::cta.b64": "barrier_arrive",
    "mbarrier.try_wait.parity.shared::cta.b64": "barrier_ended",
    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64": "barrier_ended",
    "bar.sync": "named_barrier",
    "barrier.cluster.arrive": "cluster_arrive",
    "barrier.cluster.arrive.relaxed.aligned": "cluster_arrive",
    "barrier.cluster.wait": "cluster_wait",
    "barrier.cluster.wait.aligned": "cluster_wait",
    "shfl.sync.idx.b32": "shuffle_idx",
    "shfl.sync.down.b32": "shuffle_down",
    "shfl.sync.bfly.b32": "shuffle_bfly",
    "redux.sync.min.s32": "reduce_min",
    **{f"ldmatrix.sync.aligned.m8n8.x{n}.shared.b16": "load_matrices" for n in (1, 2, 4)},
    **{f"ldmatrix.sync.aligned.m8n8.x{n}.trans.shared.b16": "load_transposed" for n in (1, 2, 4)},
    "cp.async.ca.shared.global": "copy_grouped",
    "cp.async.cg.shared.global": "copy_grouped",
    "cp.async.commit_group": "commit_group",
    "cp.async.wait_group": "wait_group",
    "stmatrix.sync.aligned.x4.m8n8.shared.b16": "store_matrices",
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64": "store_async",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": "copy_async",
    "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group": "store_box",
    "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint": "load_box",
    "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint": (
        "load_box_of_all"
    ),
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16": "multiply<256>",
}
NOTHING = (  # on one CPU thread, with stores and products done at once
    "prefetch", "fence", "setmaxnreg", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group",
    "cp.async.bulk.commit_group", "cp.async.bulk.wait_group",
)  # fmt: skip


class UnknownPtxError(Exception):
    """What the translation has no statement for."""


def entries_of(ptx: str) -> Iterator[Entry]:
    """The kernels of a module."""
    ptx = re.sub(r"//[^\n]*|^\s*\.loc\s[^\n]*", "", ptx, flags=re.M)
    dynamic = set(re.findall(r"\.extern\s+\.shared\s+[^;]*?(\w+)\[\]", ptx))
    for name, parameters, body in re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)(.*?)(?=\.entry|\Z)", ptx, re.S):
        yield Entry(name, parameters, body, dynamic)


class Entry:
    """A kernel. source: its C++, a function `kernel(parameters)`, and where its dynamic shared memory begins."""

    def __init__(self, name: str, parameters: str, body: str, dynamic: set[str]) -> None:
        self.name = name
        self.names = dict.fromkeys(dynamic, "kDynamic")  # what C++ calls what has no number
        for i, found in enumerate(re.findall(r"(\w+)\s*(?:\[\d+\]\s*)?(?:,|$)", parameters.strip())):
            self.names[found] = f"uint64_t(parameters[{i}])"
        self.files: dict[str, tuple[str, int]] = {}  # registers with a number: their type, how many
        self.scopes: list[dict[str, str]] = []
        self.made = self.static = 0
        lines = "\n".join(f"  {line}" for line in self.statements(body[body.index("{") :]))
        files = "".join(f"  {kind} {file}[{count}];\n" for file, (kind, count) in self.files.items())
        self.source = (
            f'#include "ptx.h"\n\nusing namespace ptx;\n\nconstexpr uint32_t kStatic = {self.static};\n'
            "constexpr uint32_t kDynamic = kFirstShared + (kStatic + 1023) / 1024 * 1024;\n"
            f"struct Registers {{\n{files}}};\n\n"
            f'extern "C" const uint32_t first_dynamic = kDynamic;\n'
            'extern "C" void kernel(void* const* parameters) {\n'
            f"  const Held<Registers> held;\n  Registers& R = *held.registers;\n{lines}\n}}\n"
        )

    def statements(self, text: str) -> Iterator[str]:
        """The C++ of a body in braces; PTX's scopes are C++'s."""
        at = 0
        one = re.compile(r"\s*(?:(\{)|(\})|([$\w]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
        while match := one.match(text, at):
            at = match.end()
            opened, closed, label, statement = match.groups()
            if opened:
                inside = text[at:] if not self.scopes else text[at : text.index("}", at)]
                names = re.findall(r"(?<![\w:$])([$\w]+):(?!:)", inside)
                self.scopes.append({n: f"L{self.unique()}" for n in names if self.scopes or n.startswith("$")})
                yield "{"
            elif closed:
                self.scopes.pop()
                yield "}"
                if not self.scopes:
                    return
            elif label:
                yield f"{self.named(label)}:;"
            else:
                yield from self.statement(" ".join(statement.split()))
        raise UnknownPtxError(text[at : at + 100])

    def unique(self) -> int:
        self.made += 1
        return self.made

    def named(self, name: str) -> str:
        for scope in (*reversed(self.scopes), self.names):
            if name in scope:
                return scope[name]
        raise UnknownPtxError(f"name {name}")

    def statement(self, text: str) -> Iterator[str]:
        if text.startswith(".reg"):
            yield from self.registers(*text.replace(",", " ").split()[1:])
        elif text.startswith(".shared"):
            align, name, count = re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text).groups()
            first = -(-self.static // int(align)) * int(align)
            self.scopes[-1][name], self.static = f"(kFirstShared + {first})", first + int(count)
        elif not text.startswith(".pragma"):
            guard = ""
            if text[0] == "@":
                predicate, text = text[1:].split(" ", 1)
                guard = f"if ({'!' * predicate.startswith('!')}{self.operand(predicate.lstrip('!'))}) "
            opcode, _, rest = text.partition(" ")
            if not opcode.startswith(NOTHING):
                yield f"{guard}{self.instruction(opcode, operands_of(rest))};"

    def registers(self, kind: str, *names: str) -> Iterator[str]:
        for name in names:
            if numbered := re.fullmatch(r"%(\w+)<(\d+)>", name):
                self.files[numbered[1]] = REGISTERS[kind[1:]], int(numbered[2])
            else:
                self.scopes[-1][name] = f"v{self.unique()}"
                yield f"{REGISTERS[kind[1:]]} {self.scopes[-1][name]};"

    def operand(self, text: str) -> str:
        """A register, literal, address or name as a C++ expression."""
        if text in SPECIAL:
            return SPECIAL[text]
        if (numbered := re.fullmatch(r"%([a-z]+)(\d+)", text)) and numbered[1] in self.files:
            return f"R.{numbered[1]}[{numbered[2]}]"
        if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+U?", text):
            return f"int64_t({text})"
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return f"std::bit_cast<float>(0x{found[1]}u)"
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return f"std::bit_cast<double>(0x{found[1]}ull)"
        if found := re.fullmatch(r"\[\s*([^+,\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", text):
            return f"({self.operand(found[1])} + {found[2] or 0})"
        return self.named(text)

    def instruction(self, opcode: str, given: list[str]) -> str:
        name, *how = opcode.split(".")
        if name == "bra":
            return f"goto {self.named(given[0])}"
        if name == "ret":
            return "return"
        if opcode in CALLS:
            return self.call(opcode, given)
        kind = TYPES.get(how[-1], "")
        if name in ("ld", "st"):
            return self.memory(name, how, given, kind)
        if name == "mov" and any(part[0] == "{" for part in given):
            return self.packed(given)

        def value(i: int) -> str:
            return f"as<{kind}>({self.operand(given[i])})"

        to = self.operand(given[0])
        if name == "setp" and len(how) == 2 and how[0] in COMPARISONS:
            return f"put({to}, {value(1)} {COMPARISONS[how[0]]} {value(2)})"
        if name == "setp" and len(how) == 2 and how[0] in UNORDERED:
            return f"put({to}, !({value(1)} {UNORDERED[how[0]]} {value(2)}))"
        if name == "selp":
            return f"put({to}, {self.operand(given[3])} ? {value(1)} : {value(2)})"
        if name == "cvt" and how[-2] in ("bf16x2", "f16x2"):
            return f"put({to}, dft::cuda::pack_{how[-2].removesuffix('x2')}({value(2)}, {value(1)}))"
        if name == "cvt" and how[-2] in TYPES and set(how[:-2]) <= {"rn", "rni"}:
            x = f"std::nearbyint({value(1)})" if "rni" in how else value(1)
            return f"put({to}, {TYPES[how[-2]]}({x}))"
        if name in ("mul", "mad") and how[0] == "wide":
            twice = kind.replace("32", "64")
            added = f" + as<{twice}>({self.operand(given[3])})" if name == "mad" else ""
            return f"put({to}, {twice}({value(1)}) * {twice}({value(2)}){added})"
        if name == "mul" and how == ["hi", "u64"]:
            return f"put({to}, uint64_t((unsigned __int128)({value(1)}) * {value(2)} >> 64))"
        if name in PLAIN and kind and set(how[:-1]) <= WAYS:
            return f"put({to}, {PLAIN[name](*(value(i) for i in range(1, len(given))))})"
        raise UnknownPtxError(f"{opcode} {', '.join(given)}")

    def packed(self, given: list[str]) -> str:
        """A move between a register and two of half its size."""
        if given[0][0] != "{":
            return f"pack({', '.join(self.all(given))})"
        halves = listed(given[0])
        kept = self.operand(next(part for part in halves if part != "_"))
        unread = f"unread<std::decay_t<decltype({kept})>>()"
        low, high = (unread if part == "_" else self.operand(part) for part in halves)
        return f"unpack({low}, {high}, {self.operand(given[1])})"

    def memory(self, name: str, how: list[str], given: list[str], kind: str) -> str:
        """A load or store, of a vector too."""
        address, values = (given[1], given[0]) if name == "ld" else (given[0], given[1])
        if how[0] not in ("global", "param", "shared") or not kind or set(how[1:-1]) - {"v2", "v4"}:
            raise UnknownPtxError(".".join([name, *how]))
        place = self.operand(address)
        place = f"shared({place})" if how[0] == "shared" else place
        return f"{name}_of<{kind}>({place}, {', '.join(map(self.operand, listed(values)))})"

    def all(self, given: list[str]) -> list[str]:
        """The operands of a call, those in braces or brackets one by one."""
        parts = [part for operand in given for part in listed(operand)]
        return [self.operand(part) for part in parts if part != "_"]

    def call(self, opcode: str, given: list[str]) -> str:
        if opcode.startswith("wgmma"):
            sums, a, b, adds, *how = given  # signs, and of the operands whether their rows lie along k or across
            if how[:2] != ["1", "1"]:
                raise UnknownPtxError(f"{opcode} with {how}")
            held = ", ".join(f"&{self.operand(part)}" for part in listed(sums))
            return f"{CALLS[opcode]}({{{held}}}, {', '.join(self.all([a, b, adds, *how[2:]]))})"
        if opcode.startswith("ldmatrix"):
            given = given[::-1]
        taken = self.all(given)
        if opcode.startswith("shfl") and "|" not in given[0]:
            taken.insert(1, "unread<uint8_t>()")
        return f"{CALLS[opcode]}({', '.join(taken)})"


def operands_of(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    found = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)
    return [part.strip() for part in found if part.strip()]


def listed(operand: str) -> list[str]:
    """A vector's parts, a destination's two, an address' within a tensor: [map, {coordinates}]."""
    if tensor := re.fullmatch(r"\[([^,]+), \{([^}]*)\}\]", operand):
        return [tensor[1], *listed(f"{{{tensor[2]}}}")]
    if operand[0] == "[":
        return [operand]
    return [part.strip() for part in re.split(r"[,|]", operand.strip("{}"))]
