"""Every member of the paper's ensemble, with random weights, in every precision through TensorRT-RTX's compiler.

    python tests/export/engines/compile_ilsvrc2015.py [MEMBER ...]

Some minutes and 2 GB of memory, so it is no test. Exit code 1 if one of them fails.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.export.engines.random_members import IMAGENET, exported, jobs

MEMBERS = {
    "resnet34b": (34, "B"),
    "resnet34c": (34, "C"),
    "resnet50": (50, "B"),
    "resnet101": (101, "B"),
    "resnet152": (152, "B"),
}


def main() -> int:
    failed = 0
    print("| member | precision | layers by type | plan, MB | parse and build, CPU s |\n|---|---|---|---|---|")
    for name in sys.argv[1:] or MEMBERS:
        depth, shortcut = MEMBERS[name]
        graph = exported(depth, shortcut)
        with tempfile.TemporaryDirectory() as folder:
            asked = jobs(graph, Path(folder), name, IMAGENET)
            for job in asked:  # each in a process of its own, so that a crash hides no other
                Path(folder, "jobs.json").write_text(json.dumps([job]))
                command = [sys.executable, str(Path(__file__).with_name("rtx.py")), str(Path(folder, "jobs.json"))]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                answer = json.loads(done.stdout) if done.returncode == 0 else {"message": f"exit {done.returncode}"}
                if "layers" in answer:
                    types = ", ".join(f"{n} {kind}" for kind, n in Counter(answer["layers"].values()).most_common())
                    cells = [types, f"{answer['bytes'] / 1e6:.1f}", f"{answer['seconds']:.1f}"]
                else:
                    failed += 1
                    cells = [answer["message"], "", ""]
                print(f"| {' | '.join([name, str(job['precision']), *cells])} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
