#!/usr/bin/env bash
# A Ray head on this machine, reachable from this machine alone.
set -euo pipefail
exec ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --disable-usage-stats "$@"
