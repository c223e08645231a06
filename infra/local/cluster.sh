#!/usr/bin/env bash
# A Ray cluster on this machine to try `ldm submit` against, with token authentication.
#   infra/local/cluster.sh start [CPUS]    prints what to export, then submit to http://127.0.0.1:8265
#   infra/local/cluster.sh stop
set -euo pipefail
bin="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin"
# Jobs are started with the `python` of the cluster's PATH.
export PATH="$bin:$PATH" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
case "${1:-}" in
  start)
    "$bin/ray" get-auth-token --generate >/dev/null
    "$bin/ray" start --head --num-cpus "${2:-$(nproc)}" --dashboard-host 127.0.0.1 --disable-usage-stats
    echo "now: export RAY_AUTH_MODE=token && $bin/ldm submit RECIPE --address http://127.0.0.1:8265 --follow"
    ;;
  stop) "$bin/ray" stop ;;
  *)
    echo "usage: $0 start [CPUS] | stop" >&2
    exit 2
    ;;
esac
