"""Classify pictures: a table in a terminal, JSON lines elsewhere (the rows of resnet-batch).

    resnet-classify cat.jpg dog.jpg
    curl -s https://example.org/cat.jpg | resnet-classify - --top-k 3 --protocol center
    resnet-classify *.jpg | jq -r .label

exit codes: 0; 3 when a picture could not be classified; 2 when the server could not be asked; 130 after Ctrl-C
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from resnet_ensemble.client._client import Client
from resnet_ensemble.client._errors import ResnetError, StatusError
from resnet_ensemble.client._images import encoded
from resnet_ensemble.client._types import Prediction
from resnet_ensemble.client.batch import _rows
from resnet_ensemble.client.batch._rows import Row
from resnet_ensemble.client.batch._verdict import stops

_BAR = 20  # characters for a probability of 1


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and classify. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="resnet-classify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a path, or - for the standard input")
    parser.add_argument("--url", help="the server (default: $RESNET_CLIENT_URL or http://localhost:8000)")
    parser.add_argument("--top-k", type=int, default=5, help="classes to show (default: %(default)s)")
    parser.add_argument("--protocol", help="which views to average (default: the server's own)")
    parser.add_argument("--stop", help="when to stop evaluating views (default: the server's own)")
    parser.add_argument("--json", action="store_true", help="JSON lines in a terminal too")
    given = parser.parse_args(argv)
    plain = given.json or not sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):  # JSON is UTF-8, whatever the locale is
        sys.stdout.reconfigure(encoding="utf-8" if plain else None, errors="backslashreplace")
    failed = False
    try:
        with Client(given.url) as client:
            rows = _classified(client, given.images, top_k=given.top_k, protocol=given.protocol, stop=given.stop)
            for row in rows:
                failed |= row["error_code"] is not None
                print(json.dumps(row, ensure_ascii=False) if plain else table(row), flush=True)
    except ResnetError as error:
        print(f"resnet-classify: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 1
    except KeyboardInterrupt:
        return 130
    return 3 if failed else 0


def table(row: Row) -> str:
    """A row for people."""
    path = row["path"]
    if row["error_code"] is not None:
        return f"{path}\n  {row['error_code']}: {row['error_message']}\n"
    width = max(len(entry["label"]) for entry in row["top"])
    lines = [f"  {entry['label']:<{width}}  {_bar(entry['probability'])}" for entry in row["top"]]
    votes = ", ".join(f"{vote['member']} {vote['label']} {vote['probability']:.1%}" for vote in row["members"])
    views = f"{row['views_used']} of {row['views_planned']} views"
    about = [row["protocol"], views, f"{row['latency_ms']:.0f} ms", row["bundle"]]
    return "\n".join([path, *lines, f"  members: {votes}", f"  {', '.join(about)}", ""])


def _bar(probability: float) -> str:
    full = round(_BAR * probability)
    return f"{'█' * full}{'░' * (_BAR - full)} {probability:6.1%}"


def _classified(client: Client, paths: Iterable[str], **options: Any) -> Iterator[Row]:
    """A row for each path. Raises what would be the same for every one of them."""
    for path in paths:
        name = "(standard input)" if path == "-" else _rows.printable(path)
        try:
            content = sys.stdin.buffer.read() if path == "-" else encoded(path)
        except OSError as error:
            yield _rows.of_error(name, name, None, _rows.UNREADABLE, str(error))
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        try:
            prediction: Prediction = client.classify(content, **options)
        except StatusError as error:
            if stops(error):
                raise
            yield _rows.of_error(name, name, sha256, error.code, _rows.error_message(error))
        else:
            yield _rows.of_prediction(name, name, sha256, prediction, prediction.timings_ms.get("total", 0.0))


if __name__ == "__main__":
    sys.exit(main())
