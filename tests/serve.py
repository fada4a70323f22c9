"""Starts a real Triton Inference Server with a model of `export.triton`, and holds it to what it promises.

    make serve-test
    .venv-serve/bin/python -m tests.serve --several demo/several.onnx --bundle demo/bundle --instances 2 --seconds 30

The server is the one in the package nvidia-pytriton, with the python backend, on the CPU. Clients over HTTP and gRPC
ask at once, and every byte of every answer is compared with what `Derainer` makes of the same image in this process.
Then some misbehave: they die with a request under way, send what is malformed, and more than the queue holds; meanwhile
and afterwards the others have to get the right answers. A model of several images at once is served beside it, whose
requests the server puts together. At last a process of the first model is killed.

Exit status 1 if any check fails. The last line is one JSON object; its throughput and latencies are of images of one
size, from all clients at once, on whatever else the machine was doing.
"""

from __future__ import annotations

import ctypes
import http.client
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from export.triton import ServeOptions, export
from runtime.bundle import save
from runtime.cli import main
from runtime.errors import GateError, InputError
from runtime.ort import SHIPPED
from runtime.session import Derainer, describe_onnx, open_session

MODEL = "drsformer"
SEVERAL = "several"
"""Name of the model of several images at once."""

BATCH = 4
"""Most images that the server puts together for that one."""

QUEUE = 16
"""Number of requests that may wait."""

PHOTOGRAPHS = Path(__file__).parents[1] / "docs" / "photographs"

SIZES = ((1, 1), (1, 9), (7, 5), (8, 8), (33, 47), (64, 64), (65, 63), (96, 31), (80, 120), (113, 97))
"""Height x width of what is cut out of the photographs and compared."""

TIMED = (128, 128)
"""Height x width of the images that throughput and latency are measured on."""

SLOW = (512, 512)
"""Height x width of an image that takes long enough to be interrupted."""

Pixels = NDArray[np.uint8]
Pair = tuple[Pixels, Pixels]
"""An image, and what `Derainer` makes of it."""

PROTOCOLS = {"http": tritonclient.http, "grpc": tritonclient.grpc}


class Server:
    """A tritonserver on free ports of this machine, ready when the block begins and gone when it ends, with all its
    processes. Raises GateError where it does not get ready."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.ports: dict[str, int] = dict(zip(("http", "grpc", "metrics"), _free_ports(3), strict=True))
        self.log = folder / "server.log"
        self._repository = repository
        self._folder = folder

    def __enter__(self) -> Server:
        package = importlib.util.find_spec("pytriton")
        if package is None or not package.submodule_search_locations:
            raise InputError("expected the package nvidia-pytriton, found none: start this by make serve-test")
        root = Path(package.submodule_search_locations[0])
        triton = root / "tritonserver"
        stub = triton / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
        if not stub.is_file():
            raise InputError(
                f"expected a Python that nvidia-pytriton has a backend for, found {platform.python_version()}"
            )
        backends = Path(shutil.copytree(triton / "backends", self._folder / "backends"))
        shutil.copy(stub, backends / "python")
        libraries = [str(root.parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
            "PATH": f"{Path(sys.prefix, 'bin')}:{os.environ['PATH']}",  # whose Python the backend takes
        }
        command = [triton / "bin" / "tritonserver", "--model-repository", self._repository]
        command += ["--backend-directory", backends, "--exit-timeout-secs", "5"]
        command += [f"--backend-config=python,shm-region-prefix-name={self._folder.name}"]
        for name, port in self.ports.items():
            command += [f"--{name}-port", str(port), f"--{name}-address", "127.0.0.1"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not (self.alive() and self.health("ready") == 200):
            if not self.alive() or time.monotonic() > end:
                raise GateError(f"the server did not get ready: {self.tail()}")
            time.sleep(0.1)

    def alive(self) -> bool:
        return self._process.poll() is None

    def health(self, what: str) -> int:
        """Status of /v2/health/live or /v2/health/ready; 0 if nobody answers."""
        try:
            return self.post(f"/v2/health/{what}", method="GET")
        except OSError:
            return 0

    def post(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None, method: str = "POST") -> int:
        """The status of an answer to any bytes at all."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["http"], timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            return connection.getresponse().status
        finally:
            connection.close()

    def processes(self) -> list[int]:
        """Of the first model's instances: children of the server that live and run its `model.py`."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [child for child in map(int, children) if f"/{MODEL}/" in Path(f"/proc/{child}/cmdline").read_text()]

    def batches(self, model: str) -> Counter[int]:
        """How often the model has run, by the number of images at once."""
        statistics = Client("http", self.ports).triton.get_inference_statistics(model)
        return Counter(
            {
                int(batch["batch_size"]): int(batch["compute_infer"]["count"])
                for batch in statistics["model_stats"][0]["batch_stats"]
            }
        )

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self) -> int | None:
        """Its exit status; None if it had to be killed. Nothing of its process group is left, and no shared memory."""
        status = None
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for left in Path("/dev/shm").glob(f"{self._folder.name}*"):  # by processes that were killed
            left.unlink()
        return status


class Client:
    """Asks by one protocol. For one thread."""

    def __init__(self, protocol: str, ports: dict[str, int]) -> None:
        self._triton = PROTOCOLS[protocol]
        self._protocol = protocol
        url = f"127.0.0.1:{ports[protocol]}"
        timeouts = dict(connection_timeout=60, network_timeout=60) if protocol == "http" else {}
        self.triton = self._triton.InferenceServerClient(url, **timeouts)

    def __call__(self, image: NDArray[Any], name: str = "input", model: str = MODEL) -> Pixels:
        """The answer; InferenceServerException where there is none."""
        tensor = self._triton.InferInput(name, image.shape, np_to_triton_dtype(image.dtype))
        tensor.set_data_from_numpy(image)
        timeout = {} if self._protocol == "http" else {"client_timeout": 60}
        answer = self.triton.infer(model, [tensor], **timeout).as_numpy("output")
        assert answer is not None
        return answer


class Checks:
    """What was promised and found, as lines while they come."""

    def __init__(self) -> None:
        self.done = 0
        self.failed: list[str] = []

    def __call__(self, promise: str, kept: bool, found: object = "") -> None:
        self.done += 1
        print(f"{'ok  ' if kept else 'FAIL'} {promise}{f': {found}' if str(found) else ''}", flush=True)
        if not kept:
            self.failed.append(promise)


class Load:
    """So many clients at once, every other one over gRPC, from the beginning of the block to its end. Each asks for all
    the images once or more, every time in another order.

    answers: seconds that each took, by protocol. wrong: one line for each that was missing or other than expected:
    other bytes or, from the model of several images at once, other than a level of 255 in one of 10,000 numbers, since
    a batch is computed in other blocks (docs/python.md).
    """

    def __init__(self, server: Server, count: int, pairs: list[Pair], model: str = MODEL) -> None:
        self.answers: dict[str, list[float]] = {protocol: [] for protocol in PROTOCOLS}
        self.wrong: list[str] = []
        self._server = server
        self._count = count
        self._pairs = pairs
        self._model = model
        self._end = threading.Event()

    def __enter__(self) -> Load:
        self._began = time.monotonic()
        self._pool = ThreadPoolExecutor(self._count)
        self._clients = [self._pool.submit(self._ask, i) for i in range(self._count)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._pool.shutdown()
        self.seconds = time.monotonic() - self._began
        self.wrong += [f"a client failed: {client.exception()}" for client in self._clients if client.exception()]

    def _ask(self, number: int) -> None:
        protocol = list(PROTOCOLS)[number % 2]
        client = Client(protocol, self._server.ports)
        orders = np.random.default_rng(number)
        while True:
            for i in orders.permutation(len(self._pairs)):
                image, expected = self._pairs[i]
                began = time.monotonic()
                try:
                    answer = client(image, model=self._model)
                except InferenceServerException as error:
                    self.wrong.append(f"{protocol}: {error}")
                    continue
                self.answers[protocol].append(time.monotonic() - began)
                if not (nearly_equal if self._model == SEVERAL else np.array_equal)(answer, expected):
                    self.wrong.append(f"{protocol}: other bytes for {image.shape}")
            if self._end.is_set():
                return

    def check(self, checks: Checks, promise: str) -> None:
        count = sum(map(len, self.answers.values()))
        checks(promise, not self.wrong and count > 0, self.wrong[:3] or f"{count} answers")

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        count = sum(map(len, self.answers.values()))
        result: dict[str, Any] = {"images": count, "images_per_second": round(count / self.seconds, 2)}
        for protocol, seconds in self.answers.items():
            p50, p99 = np.percentile(seconds, [50, 99]) * 1000
            result |= {f"{protocol}_p50_ms": round(p50, 1), f"{protocol}_p99_ms": round(p99, 1)}
        return result


@dataclass(frozen=True)
class Served:
    """The checks, and the load of images of one size."""

    checks: Checks
    load: Load
    local_ms: float
    settings: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checks": self.checks.done,
            "failed": self.checks.failed,
            **self.load.summary(),
            "local_ms": round(self.local_ms, 1),
            **self.settings,
        }


def serve(
    several: Path,
    bundle: Path | None = None,
    clients: int = 8,
    instances: int = 2,
    threads: int = 1,
    seconds: float = 10,
) -> Served:
    """Start a server and hold it to its promises.

    Args:
        several: ONNX model of the network that ships for any number of images at once (export.onnx --batch any).
        bundle: Bundle to serve; one of the network that ships, if not given.
        clients: Number of clients at once, half of them over HTTP and half over gRPC.
        instances: Number of requests that run at once, as for export.triton.
        threads: CPU threads of an instance, as for export.triton.
        seconds: Seconds to measure for.

    Raises:
        GateError: The server does not start.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends with us
    with tempfile.TemporaryDirectory(prefix="serve-test-") as temporary:
        folder = Path(temporary)
        bundle = bundle or bundled(SHIPPED, folder / "bundle")
        busy = os.getloadavg()[0]
        derain = Derainer(open_session(bundle, "cpu", threads))
        photographs = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
        pairs = [(crop, derain(crop)) for crop in crops(photographs, SIZES)]
        timed = [(crop, derain(crop)) for crop in crops(photographs, [TIMED] * 4)]
        local_ms = _milliseconds(derain, timed)
        repository = folder / "repository"
        export(bundle, repository, ServeOptions(MODEL, "python", instances, threads, "cpu", queue=QUEUE))
        together = bundled(several, folder / "together")
        export(together, repository, ServeOptions(SEVERAL, "python", 1, threads, "cpu", batch=BATCH))
        checks = Checks()
        with Server(repository, folder) as server:
            _check_health(checks, server)
            with Load(server, clients, pairs) as odd:
                pass
            odd.check(checks, f"{clients} clients get the bytes of the local runtime in odd sizes")
            with Load(server, clients, timed) as load:
                time.sleep(seconds)
            load.check(checks, f"{clients} clients get the bytes of the local runtime for {seconds:g} s")

            with Load(server, clients, pairs) as others:
                _check_killed_clients(checks, server, cut(photographs[0], SLOW))
                _check_malformed(checks, server)
                _check_garbage(checks, server)
            others.check(checks, "all others got the right bytes meanwhile")
            _check_overload(checks, server, *timed[0])
            _check_batches(checks, server, clients, Derainer(open_session(together, "cpu", threads)), photographs)

            with Load(server, clients, pairs) as afterwards:
                pass
            afterwards.check(checks, "afterwards all clients get the right bytes")
            _check_health(checks, server)
            _check_killed_backend(checks, server, *timed[0])
            status = server.stop()
            checks("the server ends when it is told to, even so", status is not None)
            if checks.failed:
                print(server.tail(), file=sys.stderr)
    settings = {
        "clients": clients,
        "instances": instances,
        "threads": threads,
        "height": TIMED[0],
        "width": TIMED[1],
        "cores": os.cpu_count(),
        "load_before": round(busy, 2),
        "python": platform.python_version(),
    }
    return Served(checks, load, local_ms, settings)


def bundled(model: Path, folder: Path) -> Path:
    """A new folder with a bundle of an ONNX model."""
    folder.mkdir()
    save(describe_onnx(Path(shutil.copy(model, folder))), folder)
    return folder


def nearly_equal(answer: Pixels, expected: Pixels) -> bool:
    """Whether at most one in 10,000 numbers is a level off, and none more."""
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    difference = np.abs(answer.astype(int) - expected)
    return bool(difference.max(initial=0) <= 1 and difference.mean() <= 1e-4)


def crops(photographs: list[Pixels], sizes: Sequence[tuple[int, int]]) -> list[Pixels]:
    """One of each size, from one photograph after another."""
    return [cut(photograph, size) for photograph, size in zip(itertools.cycle(photographs), sizes)]


def cut(photograph: Pixels, size: tuple[int, int]) -> Pixels:
    """From the middle; a photograph that is too small repeats itself."""
    height, width = size
    repeats = [-(-n // m) for n, m in zip(size, photograph.shape[:2], strict=True)]
    photograph = np.tile(photograph, (*repeats, 1))
    top, left = (photograph.shape[0] - height) // 2, (photograph.shape[1] - width) // 2
    return np.ascontiguousarray(photograph[top : top + height, left : left + width])


def _milliseconds(derain: Derainer, pairs: list[Pair]) -> float:
    """For one image, one after another in this process."""
    began = time.monotonic()
    for image, _ in pairs:
        derain(image)
    return (time.monotonic() - began) / len(pairs) * 1000


def _check_health(checks: Checks, server: Server) -> None:
    statuses = {
        path: server.post(path, method="GET")
        for path in ("/v2/health/live", "/v2/health/ready", *(f"/v2/models/{name}/ready" for name in (MODEL, SEVERAL)))
    }
    checks("live and ready", server.alive() and set(statuses.values()) == {200}, statuses)


def _check_killed_clients(checks: Checks, server: Server, image: Pixels) -> None:
    context = multiprocessing.get_context("spawn")
    for protocol in PROTOCOLS:
        sending, answered = context.Event(), context.Event()
        client = context.Process(
            target=_ask_and_tell, args=(protocol, server.ports, image, sending, answered), daemon=True
        )
        client.start()
        sending.wait(60)
        time.sleep(0.2)
        client.kill()
        client.join()
        under_way = sending.is_set() and not answered.is_set()
        checks(f"a client dies with a request under way over {protocol}", under_way and server.health("live") == 200)


def _ask_and_tell(protocol: str, ports: dict[str, int], image: Pixels, sending: Event, answered: Event) -> None:
    client = Client(protocol, ports)
    sending.set()
    client(image)
    answered.set()


def _check_malformed(checks: Checks, server: Server) -> None:
    """What a client library lets through."""
    image = np.zeros((8, 8, 3), np.uint8)
    faults: dict[str, dict[str, Any]] = {
        "float32 in place of uint8": dict(image=image.astype(np.float32)),
        "int8 in place of uint8": dict(image=image.astype(np.int8)),
        "no colours": dict(image=image[:, :, 0]),
        "a batch": dict(image=image[None]),
        "four channels": dict(image=np.zeros((8, 8, 4), np.uint8)),
        "no rows": dict(image=image[:0]),
        "no columns": dict(image=image[:, :0]),
        "another input": dict(image=image, name="inputs"),
        "another model": dict(image=image, model="nobody"),
    }
    _check_refused(checks, server, faults)


def _check_refused(checks: Checks, server: Server, faults: dict[str, dict[str, Any]]) -> None:
    """Requests that have to be answered as the client's fault."""
    for (what, fault), protocol in itertools.product(faults.items(), PROTOCOLS):
        try:
            Client(protocol, server.ports)(**fault)
            found = "an answer"
        except InferenceServerException as error:
            found = str(error.status())
        refused = found in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
        checks(f"{what} over {protocol} is refused", refused, found)


def _check_batches(checks: Checks, server: Server, clients: int, derain: Derainer, photographs: list[Pixels]) -> None:
    """Requests of one image and of three, from all clients at once, some of which ask for what cannot be."""
    ones = [crop[None] for crop in crops(photographs, [TIMED] * 4)]
    threes = [np.stack([crop[:96, :31], crop[:96, 31:62], crop[:96, 62:93]]) for crop in crops(photographs, [TIMED])]
    pairs = [(images, np.stack([derain(image) for image in images])) for images in (*ones, *threes)]
    images = np.zeros((BATCH + 1, 8, 8, 3), np.uint8)
    faults: dict[str, dict[str, Any]] = {
        "an image without a batch": dict(image=images[0], model=SEVERAL),
        "more images than are taken at once": dict(image=images, model=SEVERAL),
        "a batch of images without rows": dict(image=images[:2, :0], model=SEVERAL),
    }
    before = server.batches(SEVERAL)
    with Load(server, clients, pairs, SEVERAL) as load:
        _check_refused(checks, server, faults)
    load.check(checks, f"{clients} clients of one image and of three at once get the images of the local runtime")
    ran = server.batches(SEVERAL) - before
    checks("their requests went through the network together", ran[2] + ran[BATCH] > 0, dict(sorted(ran.items())))


def _check_garbage(checks: Checks, server: Server) -> None:
    """What no client library would send."""
    infer = f"/v2/models/{MODEL}/infer"
    noise = np.random.default_rng(0).bytes(5000)

    def request(shape: list[int], **more: Any) -> bytes:
        return json.dumps({"inputs": [{"name": "input", "shape": shape, "datatype": "UINT8", **more}]}).encode()

    binary = request([8, 8, 3], parameters={"binary_data_size": 192})
    requests: dict[str, tuple[bytes, dict[str, str]]] = {
        "noise": (noise, {}),
        "nothing": (b"", {}),
        "other JSON": (b"[1, 2]", {}),
        "JSON without inputs": (b"{}", {}),
        "fewer pixels than it says": (request([8, 8, 3], data=[1, 2, 3]), {}),
        "text for pixels": (request([1, 1, 3], data=["a", "b", "c"]), {}),
        "a negative size": (request([-8, 8, 3], data=[1] * 192), {}),
        "a large image of three numbers": (request([10**4, 10**4, 3], data=[1, 2, 3]), {}),
        "a header longer than the body": (binary, {"Inference-Header-Content-Length": "99999"}),
        "a header of negative length": (binary, {"Inference-Header-Content-Length": "-1"}),
        "fewer bytes than it says": (binary + noise[:100], {"Inference-Header-Content-Length": str(len(binary))}),
        "more bytes than it says": (binary + noise[:300], {"Inference-Header-Content-Length": str(len(binary))}),
        "gzip that is none": (noise, {"Content-Encoding": "gzip"}),
    }
    for what, (body, headers) in requests.items():
        status = server.post(infer, body, headers)
        checks(f"{what} over http is refused", status >= 400, status)
    half = f"POST {infer} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n".encode() + noise
    for protocol, (what, sent) in itertools.product(PROTOCOLS, {"noise": noise, "half a request": half}.items()):
        with socket.create_connection(("127.0.0.1", server.ports[protocol]), timeout=10) as connection:
            connection.sendall(sent)
        checks(f"{what} to the port of {protocol} does no harm", server.health("live") == 200)


def _check_overload(checks: Checks, server: Server, image: Pixels, expected: Pixels) -> None:
    """More at once than the queue holds: some are refused, none is lost and none is wrong."""

    def ask(_: int) -> str:
        try:
            return "right" if np.array_equal(Client("grpc", server.ports)(image), expected) else "wrong"
        except InferenceServerException as error:
            return str(error.status())

    with ThreadPoolExecutor(4 * QUEUE) as pool:
        found = Counter(pool.map(ask, range(4 * QUEUE)))
    kept = set(found) == {"right", "StatusCode.UNAVAILABLE"} and found["right"] >= QUEUE
    checks(f"{4 * QUEUE} requests at a queue of {QUEUE} are answered or refused as unavailable", kept, dict(found))


def _check_killed_backend(checks: Checks, server: Server, image: Pixels, expected: Pixels) -> None:
    """A process of the model is killed, as by a system that runs out of memory. This server neither starts another nor
    says so at its health endpoints, so that a probe has to count the processes (README); the other instances go on."""
    processes = server.processes()
    os.kill(processes[0], signal.SIGKILL)
    client = Client("grpc", server.ports)
    found: Counter[str] = Counter()
    for _ in range(4 * len(processes)):
        try:
            found["right" if np.array_equal(client(image), expected) else "wrong"] += 1
        except InferenceServerException as error:
            found[str(error.status())] += 1
    kept = set(found) <= {"right", "StatusCode.INTERNAL"} and (found["right"] > 0 or len(processes) == 1)
    checks("a process of the model dies: requests to it fail at once, the others are answered", kept, dict(found))
    checks("the processes that are left tell so", server.processes() == processes[1:])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _end_with_parent() -> None:
    """Linux: let this process get SIGTERM when its parent is gone, however that came."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _status(served: Served) -> int:
    return 1 if served.checks.failed else 0


if __name__ == "__main__":
    main(serve, __doc__, summary=Served.summary, status=_status)
