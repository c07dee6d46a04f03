#!/usr/bin/env bash
# Compares the pinned dependencies with the known vulnerabilities, by pip-audit in an environment of its own.
# Needs the network: PyPI, or with AUDIT_SERVICE=osv the database of osv.dev. Fails if there is a vulnerability, or if a
# pin could not be looked up. Exceptions, each with its reason, would be arguments --ignore-vuln below; there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install -qq --disable-pip-version-check pip-audit
"$place/venv/bin/pip-audit" --strict --no-deps --disable-pip --progress-spinner off \
    --vulnerability-service "${AUDIT_SERVICE:-pypi}" -r tools/requirements-cpu.txt
