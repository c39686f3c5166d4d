#!/usr/bin/env python3
"""Stands for the python of a vLLM environment: serves /health, with a child process.

FAKE_VLLM: "ends" (it ends with an error in its log), "silent" (it never answers), "stubborn" (only SIGKILL ends
its child), or nothing.
"""

import http.server
import os
import signal
import subprocess
import sys
import time

if sys.argv[1] == "-c":
    print("[false, false]" if os.environ.get("FAKE_VLLM") == "none" else "[true, false]")
    sys.exit()
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv if "=" in word)
if os.environ.get("FAKE_VLLM") == "ends":
    print("INFO: loading\nValueError: no such model\nINFO: bye", flush=True)
    sys.exit(3)
if sys.argv[1] == "child":
    if os.environ.get("FAKE_VLLM") == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(300)
child = subprocess.Popen([sys.executable, __file__, "child"], stdout=subprocess.PIPE)
assert child.stdout is not None and child.stdout.readline()
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
module, _, name = options["middleware"].partition(".")
assert getattr(__import__(module), name)(None) is not None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if os.environ.get("FAKE_VLLM") == "silent" else 200)
        self.end_headers()


http.server.HTTPServer((options["host"], int(options["port"])), Handler).serve_forever()
