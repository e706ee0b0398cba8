"""Audit of the packages of constraints.txt with pip-audit, with a list of the packages that it could not look up.

    python .ci/audit.py [--must]

pip-audit itself exits with 0 when its service knows none of the packages, for example behind a mirror. Exit code 1: a
known vulnerability that EXPLAINED does not list. With --must also: a package without a result.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PINNED = ROOT / "constraints.txt"
SERVICES = ("pypi", "osv")
EXPLAINED: dict[str, str] = {}  # id of a vulnerability -> the reason why it cannot be exploited here


def main() -> None:
    problems = []
    for service in SERVICES:
        found, problem = ask(service)
        looked_up = [package for package in found if "skip_reason" not in package]
        if looked_up:
            sys.exit(judge(found, looked_up))
        problems.append(f"{service}: {problem or 'knows none of the packages'}")
    print(f"NOT AUDITED: no service answered for {PINNED.name}; {'; '.join(problems)}", file=sys.stderr)
    sys.exit(1 if "--must" in sys.argv else 0)


def ask(service: str) -> tuple[list[dict[str, Any]], str]:
    """Return a service's report on each package, or an empty list and the reason."""
    command = [
        *(sys.executable, "-m", "pip_audit", "--vulnerability-service", service, "--timeout", "20"),
        *("--requirement", str(PINNED), "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        return [], (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]


def judge(found: list[dict[str, Any]], looked_up: list[dict[str, Any]]) -> int:
    """Print the vulnerabilities; return the exit code."""
    code = False
    for package in looked_up:
        for vulnerability in package["vulns"]:
            names = [vulnerability["id"], *vulnerability.get("aliases", [])]
            reason = next((EXPLAINED[name] for name in names if name in EXPLAINED), "")
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {names[0]}, fixed in {fixed}; {reason or 'not explained'}")
            code = code or not reason
    skipped = [package["name"] for package in found if "skip_reason" in package]
    if skipped:
        print(f"NOT AUDITED: {len(skipped)} packages, {', '.join(skipped[:10])}, ...", file=sys.stderr)
        code = code or "--must" in sys.argv
    print(f"{len(looked_up)} packages audited", file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    main()
