"""Run service and canvas together until Ctrl-C: the last step of `make demo`.

It starts the two programs that a person would start by hand, waits until both answer, and prints the page's address.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import httpx

HOST = "127.0.0.1"
START_SECONDS = 90
STOP_SECONDS = 15


def port_of(variable: str, default: int) -> int:
    """Return the port that an environment variable sets, or the default."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise SystemExit(f"error: {variable} must be a port number from 1 to 65535, got {text!r}.")
    return int(text)


def check_free(port: int, variable: str, what: str) -> None:
    """Exit with one sentence if somebody listens on the port already."""
    with socket.socket() as probe:
        # As servers do it: a connection that is only closing down does not keep the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise SystemExit(
                f"error: port {port}, for the {what}, is in use on {HOST}. "
                f"Stop the program that holds it, or choose another port: make demo {variable}={port + 1000}"
            ) from None


def wait_until(healthy: Callable[[], bool], process: subprocess.Popen, what: str) -> None:
    """Wait for a server to answer; exit with one sentence if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"error: the {what} ended with exit code {process.returncode}; its message stands above.")
        if healthy():
            return
        time.sleep(0.2)
    raise SystemExit(f"error: the {what} did not answer within {START_SECONDS} s.")


def answers(url: str) -> bool:
    """Tell whether a URL answers with 200."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def stop(processes: list[subprocess.Popen]) -> None:
    """End the servers and whatever they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--check-ports", action="store_true", help="only check that both ports are free")
    arguments = parser.parse_args()
    service_port = port_of("SERVICE_PORT", 3000)
    canvas_port = port_of("CANVAS_PORT", 8501)
    check_free(service_port, "SERVICE_PORT", "service")
    check_free(canvas_port, "CANVAS_PORT", "canvas")
    if arguments.check_ports:
        return 0
    service_url = f"http://{HOST}:{service_port}"
    canvas_url = f"http://{HOST}:{canvas_port}"
    bentoml = ["bentoml", "serve", "app.service:PixelCNNService", "--host", HOST, "--port", str(service_port)]
    streamlit = ["streamlit", "run", "app/canvas.py", "--server.address", HOST, "--server.port", str(canvas_port)]
    environment = {**os.environ, "PIXELCNN_SERVICE_URL": service_url}

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    processes: list[subprocess.Popen] = []
    try:
        # Process groups of their own, so that Ctrl-C reaches this program alone and it ends all the others.
        processes.append(subprocess.Popen(bentoml, env=environment, start_new_session=True))
        wait_until(lambda: answers(f"{service_url}/readyz"), processes[0], "service")
        processes.append(subprocess.Popen(streamlit, env=environment, start_new_session=True))
        wait_until(lambda: answers(f"{canvas_url}/_stcore/health"), processes[1], "canvas")
        print(f"\nReady: draw at {canvas_url} (service: {service_url}). Ctrl-C ends both.\n", flush=True)
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
        print("error: a part of the demo ended by itself; its message stands above.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
        return 0
    finally:
        stop(processes)


if __name__ == "__main__":
    sys.exit(main())
