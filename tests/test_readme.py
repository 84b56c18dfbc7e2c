"""README.md's example runs as it stands, in an interpreter that has imported nothing before."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_runs_in_a_fresh_process():
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{example}"
    code += "\nassert 'transformers' not in sys.modules"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLIMKERNELS", "TRITON_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, cwd=os.sep)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("layer_norm runs on ")
