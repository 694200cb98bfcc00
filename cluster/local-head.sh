#!/usr/bin/env bash
# Start a Ray head that only this machine can reach, and only with the token in ~/.ray/auth_token.
set -euo pipefail
umask 077
export RAY_AUTH_MODE=token
# With this off, Ray takes the address that is given, and opens all its ports there.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
ray get-auth-token --generate >/dev/null
exec ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 \
  --dashboard-agent-listen-port=0 --disable-usage-stats "$@" # another Ray of this machine may have the usual port
