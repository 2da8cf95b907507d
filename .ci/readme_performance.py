"""Put benchmark tables into a README: python -m quantization bench | python .ci/readme_performance.py README.md

Of the program's output on stdin this takes the line of the CPU, the short tables and the legend; they replace what
stands in the fenced block after "<!-- bench -->". A run with rows that were disturbed or left out, or with no other
library, is refused unless --anyway is given.
"""

import pathlib
import re
import sys

TITLES = ("products in short", "quantize, dequantize, convert, fake quantize", "small calls")

path = pathlib.Path(sys.argv[1])
paragraphs = sys.stdin.read().strip().split("\n\n")
missing = [title for title in TITLES if title not in paragraphs]
if missing:
    sys.exit(f"readme_performance: stdin has no table {missing[0]!r}: is it the output of a whole run?")
tables = [f"{title}\n\n{paragraphs[paragraphs.index(title) + 1]}" for title in TITLES]
machine = paragraphs[0].splitlines()[:3]
text = "\n\n".join(["\n".join(machine), *tables, paragraphs[-1]])
spoiled = re.search(r"^.*(disturbed|time is up|none measured)( *\||$)", "\n\n".join(tables), re.MULTILINE)
if spoiled and "--anyway" not in sys.argv[2:]:
    sys.exit(
        f"readme_performance: measure with peers on a machine that does nothing else, or give --anyway: {spoiled[0]}"
    )
readme = path.read_text(encoding="utf-8")
block = re.compile(r"(?<=<!-- bench -->\n```text\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
if len(block.findall(readme)) != 1:
    sys.exit(f"readme_performance: {path} has not exactly one block after <!-- bench -->")
path.write_text(block.sub(lambda _: text + "\n", readme), encoding="utf-8")
