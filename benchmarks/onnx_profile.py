"""Where an ONNX file's time goes, operator by operator, by onnxruntime's profiler.

    python benchmarks/onnx_profile.py runs/onnx/onnx/model.onnx runs/onnx/onnx/model_int8.onnx

Of every node the shortest of its runs, which is what it takes when the machine leaves it alone. The last line is JSON:
of each file and shape the milliseconds by operator, as onnxruntime runs it after its own fusions, and of all together.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import onnxruntime

from prunelle.export.latency import full_batch, parse_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["1x32", "1x128", "16x128"], help="batch x tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=6)
    options = parser.parse_args()

    found: dict[str, dict[str, dict[str, float]]] = {}
    for file in options.files:
        found[str(file)] = {}
        for shape in options.shapes:
            times = profile(file, shape, options.threads, options.runs)
            found[str(file)][shape] = {name: round(taken, 3) for name, taken in times.items()}
            print(f"{file} at {shape}: {times['all']:.2f} ms")
            for name, taken in list(times.items())[1:]:
                if taken > 0.01 * times["all"]:
                    print(f"    {name:28}{taken:10.3f} ms {taken / times['all']:6.1%}")
    print(json.dumps(found))


def profile(file: Path, shape: str, threads: int, runs: int) -> dict[str, float]:
    """Milliseconds by operator, and `all`, the largest first."""
    with tempfile.TemporaryDirectory() as folder:
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = threads
        session_options.log_severity_level = 3
        session_options.enable_profiling = True
        session_options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(file, session_options, providers=["CPUExecutionProvider"])
        words = full_batch(*parse_shape(shape, 512), 1000)
        inputs = {tensor.name: words[tensor.name].numpy() for tensor in session.get_inputs()}
        for _ in range(runs + 1):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"], event["args"]["op_name"]].append(event["dur"] / 1000)
    times: dict[str, float] = defaultdict(float)
    for (_, operator), taken in nodes.items():
        times[operator] += min(taken[1:])  # the first warms up
        times["all"] += min(taken[1:])
    return dict(sorted(times.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    main()
