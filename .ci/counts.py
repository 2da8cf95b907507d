"""Instructions that kernels take, beside the table in counts.txt: counts.py OBJECTS WORK [--update].

OBJECTS holds avx512.o, avx512_kv.o, and the program `counts` linked from counts.c with the other units; WORK takes what
callgrind writes. Rows say: instruction set, kernel, and either instructions for 64 products (or 64 elements), counted
by callgrind, or, for avx512, which callgrind does not know, instructions of the kernel's hot loop.
"""

import pathlib
import re
import subprocess
import sys

TABLE = pathlib.Path(__file__).with_name("counts.txt")

# One compiler makes the same code of the same source everywhere; another patch release of it, or another C library's
# memcpy, moves a row by a percent or so. A kernel that lost an optimisation moves further.
MARGIN = 0.03

# Each kernel of avx512 by its function, and a word of the instructions that its hot loop has more of than other loops.
LOOPS = {
    **{
        f"matmul_t_{bits}_digits_{digits}": (f"decode_multiply_affine_{bits}_1_{digits}", "vpdpbusd")
        for bits in (2, 3, 4, 5, 6, 8)
        for digits in (1, 2, 3)
    },
    **{f"matmul_t_{mode}": (f"decode_multiply_{mode}_0_3", "vpdpbusd") for mode in ("mxfp4", "nvfp4")},
    "matmul_t_mxfp8": ("decode_t_fp8", "vfmadd"),
    **{f"quantize_{mode}": (f"quantize_metal_{mode}", "zmm") for mode in ("mxfp4", "mxfp8", "nvfp4")},
    **{f"lines_4_digits_{digits}": (f"first_tile_{digits}_4", "vpdpbusd") for digits in (2, 3)},
    "prefill_tile": ("tile_narrow_8", "vpdpbusd"),
    "matmul_n_4_digits_3": ("matmul_n_affine_4_3", "vpdpbusd"),
    "quantize_4": ("quantize_metal_affine_4", "zmm"),
    "dequantize_4": ("dequantize_affine_4", "zmm"),
    "fake_quantize": ("fake_quantize", "zmm"),
    "load_f16": ("load", "vcvtph2ps"),
    "float_t_4_m_1": ("float_decode_t_affine_4", "vcvtdq2ps"),
    "float_t_4_m_4": ("float_decode_t_affine_4", "vfmadd231ps"),
    "float_t_4_panel": ("float_prefill_t_affine_4", "vpermps"),
    "float_n_4_panel": ("float_n_affine_4", "vcvtdq2ps"),
    "float_tile": ("multiply_rows.constprop.0", "vfmadd231ps"),
    **{
        f"kv_{name}_{row}": (f"{name}_{function}", word)
        for name in ("score", "weigh")
        for row, function, word in (
            ("4_m_1", "one_4_0", "vpermps"),
            ("8_m_1", "one_8_1", "vpmovb2m"),
            ("4_m_8", "several_4_0", "vfmadd231ps"),
        )
    },
    "kv_encode_4": ("search_128", "vpermps"),
    "kv_encode_4_rotation": ("transform_128", "zmm"),
    "kv_encode_8": ("encode_blocks", "vgatherdps"),
    "kv_encode_rotation": ("encode_blocks", "vshuff32x4"),
    "kv_decode_rotation": ("decode", "vshuff32x4"),
    "kv_rescale": ("rescale", "zmm"),
    "kv_merge": ("merge", "zmm"),
}


def called(program: pathlib.Path, isa: str, work: pathlib.Path) -> dict[tuple[str, str], float]:
    """Instructions a unit from one callgrind run: the difference of a kernel's two sizes."""
    out = work / f"callgrind.{isa}"
    command = ["valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={out}", program, isa]
    subprocess.run(command, check=True)
    sizes: dict[str, list[tuple[int, int]]] = {}
    for part in work.glob(f"{out.name}.*"):
        text = part.read_text()
        trigger = re.search(r"^desc: Trigger: Client Request: (\S+) (\d+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if trigger and total:
            sizes.setdefault(trigger[1], []).append((int(trigger[2]), int(total[1])))
    rows = {}
    for kernel, pair in sizes.items():
        (units, count), (more_units, more) = sorted(pair)
        rows[isa, kernel] = round((more - count) / (more_units - units), 1)
    return rows


def hot_loop(lines: list[tuple[int, str]], word: str) -> int:
    """Instructions of the loop without inner loops that has most of `word`, the largest of several."""
    loops = set()
    for address, text in lines:
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        if jump and lines[0][0] <= int(jump[1], 16) <= address:
            loops.add((int(jump[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[text for address, text in lines if first <= address <= last] for first, last in inner]
    return max((sum(word in text for text in body), len(body)) for body in bodies)[1]


def looped(units: list[pathlib.Path]) -> dict[tuple[str, str], float]:
    """The rows of avx512, from a disassembly."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", *units]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            lines = functions.setdefault(head[1], [])
        elif body := re.match(r"\s+([0-9a-f]+):\s+(\S.*)$", line):
            lines.append((int(body[1], 16), body[2]))
    rows = {}
    for kernel, (name, word) in LOOPS.items():
        function = functions.get(f"{name}_avx512") or functions[name]  # helpers have no instruction set in their names
        rows["avx512", kernel] = float(hot_loop(function, word))
    return rows


def compare(now: dict[tuple[str, str], float]) -> int:
    """Print both tables side by side; return how many rows are out."""
    lines = [line.split() for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    then = {(isa, kernel): float(count) for isa, kernel, count in lines}
    out = 0
    for row in sorted(now.keys() | then.keys()):
        before, after = then.get(row), now.get(row)
        if before is None or after is None:
            change, verdict = "", "only in the table" if after is None else "not in the table"
        else:
            change = f"{100 * (after / before - 1):+.1f} %" if before else ""
            verdict = "MORE" if after > before * (1 + MARGIN) else "fewer" if after < before * (1 - MARGIN) else ""
        out += verdict not in ("", "fewer")
        print(f"{row[0]:8} {row[1]:28} {before or '-':>9} {after or '-':>9} {change:>9} {verdict}".rstrip())
    return out


def main() -> None:
    """Count, then compare or update."""
    objects, work = (pathlib.Path(argument) for argument in sys.argv[1:3])
    now = looped([objects / "avx512.o", objects / "avx512_kv.o"])
    for isa in ("avx2", "generic"):
        now |= called(objects / "counts", isa, work)
    compiler = subprocess.run(["gcc", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    if "--update" in sys.argv[3:]:
        head = "# instruction set, kernel, instructions: see counts.py; written by `bash .ci/gates/counts --update`\n"
        rows = "".join(f"{isa} {kernel} {count}\n" for (isa, kernel), count in sorted(now.items()))
        TABLE.write_text(f"{head}# {compiler}\n{rows}")
        print(TABLE.read_text(), end="")
    elif out := compare(now):
        sys.exit(f"{out} rows are out, with {compiler}; the table's: {TABLE.read_text().splitlines()[1][2:]}")


main()
