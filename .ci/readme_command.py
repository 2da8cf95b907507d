"""Print the one shell command of a README that holds a phrase: readme_command.py README PHRASE.

Commands are the lines of fenced blocks marked console, sh, shell or bash; a leading "$ " is a prompt, and a line that
ends in "\\" or "&&" goes on in the next. Anything but exactly one such command is an error.
"""

import pathlib
import re
import sys

text = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
phrase = sys.argv[2]
blocks = re.findall(r"^```(?:console|sh|shell|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
lines = [line for block in blocks for line in re.sub(r"\\\n\s*|(?<=&&)\s*\n\s*", " ", block).splitlines()]
commands = {line.removeprefix("$ ").strip() for line in lines if phrase in line}
if len(commands) != 1:
    sys.exit(f"{sys.argv[1]}: expected one command with {phrase!r}, found {sorted(commands)}")
print(commands.pop())
