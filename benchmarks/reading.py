"""Times random reads of a data set's records, from files and straight from a bucket.

    python -m benchmarks.reading
    python -m benchmarks.reading --folder /dev/shm --preflight results/preflight/records.jsonl

The records are random bytes of a photograph's size, in one ArrayRecord file of the size of one of
ImageNet's. The bucket is a stand-in on this machine: it speaks Cloud Storage's protocol with the
reader's own client, answers after --latency_ms, and counts. A real one is far away, and encrypts.
--preflight adds what each host of a slice needs, from convstem_jax.preflight --records.
"""

import collections
import concurrent.futures
import contextlib
import http.server
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import time

from array_record.python import array_record_module
import numpy as np
from tabulate import tabulate

from benchmarks import arguments
from convstem_jax import files
from convstem_jax.terminal import positive

# Bytes of an image of ImageNet's training set on average, in the official tar file.
RECORD_BYTES = 115_000
# What tfds gives the reader: random access reads nothing ahead.
OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write_records(path: str, num: int) -> None:
    """Writes records of incompressible bytes, each readable by itself, as tfds does."""
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    rng = np.random.default_rng(0)
    for _ in range(num):
        writer.write(rng.bytes(RECORD_BYTES))
    writer.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers `GET /storage/v1/b/BUCKET/o/OBJECT?alt=media` with a range of a file."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.counts["connections"] += 1

    def log_message(self, *unused):
        pass

    def do_GET(self):
        time.sleep(self.server.latency)
        name = os.path.basename(self.path.partition("?")[0])
        size = os.path.getsize(self.server.folder / name)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
        start = int(first) if first else size - int(last)
        end = int(last) + 1 if first and last else size
        self.server.counts["requests"] += 1
        self.send_response(206)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        with open(self.server.folder / name, "rb") as file:
            file.seek(start)
            try:
                while data := file.read(min(2**16, end - file.tell())):
                    self.wfile.write(data)
                    self.server.counts["bytes"] += len(data)
            except ConnectionError:  # the reader has what it wants, and hangs up
                self.close_connection = True


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args):
        if not isinstance(sys.exception(), ConnectionError):  # hung up before its next request
            super().handle_error(*args)


@contextlib.contextmanager
def bucket(folder: pathlib.Path, latency: float):
    """A stand-in for Cloud Storage; yields what it counts.

    Args:
        folder: its files are the bucket's objects.
        latency: seconds from a request to the first byte.
    """
    server = _Server(("localhost", 0), _Handler)
    server.folder, server.latency, server.counts = folder, latency, collections.Counter()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    name = "CLOUD_STORAGE_EMULATOR_ENDPOINT"  # which the reader's client asks for
    os.environ[name] = f"http://localhost:{server.server_port}"
    try:
        yield server.counts
    finally:
        del os.environ[name]
        server.shutdown()
        thread.join()
        server.server_close()


def time_reads(reader, num_reads: int, num_threads: int) -> float:
    """Records a second, drawn at random, read by that many threads at a time."""
    indices = np.random.default_rng(1).integers(reader.num_records(), size=num_reads).tolist()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        start = time.perf_counter()
        for record in pool.map(lambda i: reader.read([i])[0], indices):
            if len(record) != RECORD_BYTES:
                raise RuntimeError(f"a record of {len(record)} bytes came back")
        return num_reads / (time.perf_counter() - start)


def measure(folder: pathlib.Path, *, num_records, num_reads, threads, latencies) -> list[dict]:
    """Rows of the table."""
    path = folder / "data.array_record"
    write_records(str(path), num_records)
    rows = []

    def add(source, num_threads, speed, per_record):
        rows.append(
            {"from": source, "threads": num_threads, "records_per_second": round(speed)}
            | {"mb_per_second": round(speed * RECORD_BYTES / 1e6)}
            | {name: value and round(value, 2) for name, value in per_record.items()}
        )

    nothing = dict.fromkeys(("requests", "connections", "bytes_sent_per_byte"))
    for num_threads in threads:
        reader = array_record_module.ArrayRecordReader(str(path), OPTIONS)
        add("file", num_threads, time_reads(reader, num_reads, num_threads), nothing)
        for latency in latencies:
            with bucket(folder, latency / 1000) as counts:
                reader = array_record_module.ArrayRecordReader(f"gs://bucket/{path.name}", OPTIONS)
                counts.clear()  # of reading the index at the file's end
                speed = time_reads(reader, num_reads, num_threads)
                add(
                    f"bucket, {latency:g} ms", num_threads, speed,
                    {
                        "requests": counts["requests"] / num_reads,
                        "connections": counts["connections"] / num_reads,
                        "bytes_sent_per_byte": counts["bytes"] / num_reads / RECORD_BYTES,
                    },
                )  # fmt: skip
                reader.close()
    path.unlink()
    return rows


def demand(path: str) -> list[dict]:
    """What each host of the slices in a preflight's records has to read."""
    rows = []
    with open(path) as file:
        for record in map(json.loads, file):
            if record["images_per_second"]:
                images = record["images_per_second"] / record["hosts"]
                row = {"config": record["spec"], "slice": record["topology"]}
                row |= {"images_per_second_and_host": round(images)}
                rows.append(row | {"mb_per_second_and_host": round(images * RECORD_BYTES / 1e6)})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    parser = arguments.new_parser(
        "reading", __doc__, json="write the tables as an object of lists too"
    )
    add = parser.add_argument
    add("--folder", help="where to write the file (default: one for temporary files)")
    add("--records", type=positive, default=1251,
        help="how many the file has (default: %(default)s, ImageNet's)")  # fmt: skip
    add("--reads", type=positive, default=2000,
        help="how many for each line (default: %(default)s)")  # fmt: skip
    add("--threads", type=positive, nargs="+", default=[1, 16],
        help="default: %(default)s")  # fmt: skip
    add("--latency_ms", type=float, nargs="+", default=[0, 30], help="default: %(default)s")
    add("--preflight", metavar="FILE", help="records whose demand to print too")
    args = parser.parse_args(argv)
    if min(args.latency_ms) < 0:
        parser.error(f"--latency_ms {min(args.latency_ms):g} must be 0 or more")
    if args.folder and not os.path.isdir(args.folder):
        parser.error(f"--folder {args.folder} is no folder: make it, or name another")
    if args.preflight and not os.path.isfile(args.preflight):
        parser.error(f"--preflight {args.preflight} is not there")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tables = {
            "reading": measure(
                pathlib.Path(folder), num_records=args.records, num_reads=args.reads,
                threads=args.threads, latencies=args.latency_ms,
            )
        }  # fmt: skip
    if args.preflight:
        tables["demand"] = demand(args.preflight)
    for rows in tables.values():
        print(tabulate(rows, headers="keys", tablefmt="github"), end="\n\n")
    if args.json:
        about = {"array_record": importlib.metadata.version("array_record")}
        files.write_json(args.json, tables | {"about": about | arguments.made_by(argv)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
