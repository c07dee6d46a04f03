"""Every wait in the package has a timeout, or is watched over: read from the source."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "tealightning"
# Methods that wait for ever without an argument, and functions that do without `timeout=`.
METHODS = {"join", "wait", "result", "acquire", "get", "recv"}
FUNCTIONS = {
    "communicate",
    "run",
    "check_output",
    "check_call",
    "request",
    "urlopen",
    "as_completed",
    "barrier",
    "monitored_barrier",
}
OWNERS = {"subprocess", "requests", "session", "dist", "process"}

WATCHED = {
    "callbacks/rollout.py: self._ahead.wait()": "in Activity.GENERATING",
    "rewards/user_function.py: pool.submit(asyncio.run, values).result()": "in Activity.SCORING, or in a worker",
    "rewards/function.py: self._channel.recv()": "a timer kills the worker, which closes the pipe",
    "rewards/user_function.py: channel.recv()": "a worker waits for its parent, whose end closes the pipe",
    "reporting/provenance.py: subprocess.run(command, capture_output=True, text=True, check=False)": "reads the "
    "package's own checkout, and is no part of a run",
    "rollouts/prefetch.py: self.wait()": "in Activity.GENERATING, or while a checkpoint is saved",
    "rollouts/prefetch.py: task.result()": "of a thread that has ended",
    "rollouts/collector.py: pending[p].result()": "in Activity.SCORING",
    "rollouts/vllm_client.py: future.result()": "of a future that is done",
    "rollouts/vllm_client.py: as_completed(numbers)": "every request has a timeout",
    "reliability/ranks.py: dist.barrier()": "in Activity.SYNCING or STARTING",
    "reliability/processes.py: child.wait()": "of a process that was killed; and nobody waits for the supervisor",
    "ablation/runner.py: connection.recv()": "a thread that waits for the end of the parent, and for nothing else",
    "ablation/runner.py: one.connection.recv()": "of a pipe that something is in",
    "ablation/runner.py: done.process.join()": "of a process that has ended",
    "ablation/runner.py: one.process.join()": "of a process that was killed",
}
"""Waits without a timeout, and why they end."""


def untimed(tree: ast.Module) -> list[str]:
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        keywords = {keyword.arg for keyword in call.keywords}
        is_function = (
            name in FUNCTIONS
            and (owner in OWNERS or (not owner and name != "run"))
            and not keywords & {"timeout", None}
        )
        if is_function or (name in METHODS and not call.args and not keywords):
            found.append(ast.unparse(call))
    return found


def test_every_wait_has_a_timeout_or_is_watched():
    found = [
        f"{file.relative_to(PACKAGE)}: {call}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for call in untimed(ast.parse(file.read_text(encoding="utf-8")))
    ]
    unknown = sorted(set(found) - WATCHED.keys())
    assert not unknown, "give these a timeout and a message, or put them in a phase:\n" + "\n".join(unknown)


def test_untimed_waits_are_found():
    code = "thread.join(); ', '.join(x); q.get(timeout=1); subprocess.run(['a']); subprocess.run(['a'], timeout=3)"
    assert untimed(ast.parse(code)) == ["thread.join()", "subprocess.run(['a'])"]
