"""Write a Chrome trace of a run: who worked when, of every process, also while the run goes on.

Open the file in ui.perfetto.dev or chrome://tracing. The report draws the newest step alone."""

import argparse

from launch.arguments import out_file, path

EXAMPLES = """\
  qarl trace runs/quickstart
  qarl trace runs/quickstart --out trace.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=path, help="folder of a run")
    parser.add_argument(
        "--out", metavar="FILE", type=out_file, help="the trace (default: trace.json in the run's folder)"
    )


def run(args: argparse.Namespace) -> int:
    import json

    from launch.run.files import write_whole
    from launch.run.resume import check_is_run
    from launch.run.spans import chrome_trace, read_spans
    from qarl.errors import DataError

    spans = read_spans(args.run_dir)
    if not spans:
        check_is_run(args.run_dir)
        raise DataError("no process has logged what it did", str(args.run_dir / "logs"), "the run has done nothing yet")
    out = args.out or args.run_dir / "trace.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(chrome_trace(spans)))
    print(out)
    return 0
