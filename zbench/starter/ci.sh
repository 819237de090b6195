#!/usr/bin/env bash
# Measure scenario.yaml, gate it against baseline.json, keep a history. For any CI that can run a shell.
#
#   bash ci.sh                  or with arguments for `zbench run`:
#   bash ci.sh -o repeats=5
#
# Exit codes: 0 no regression, 1 regressed, 2 bad input or no baseline yet, 3 not comparable, 5 some trials failed.
#
# ZBENCH_OUT       where results go (default: zbench-results)
# ZBENCH_HISTORY   a history.jsonl to add the run to; unset, no history is kept (set it on your main branch only)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${ZBENCH_OUT:-zbench-results}
mkdir -p "$out"

zbench run "$here/scenario.yaml" --out "$out" --json "$@" >"$out/outcome.json"
run=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["folder"])' "$out/outcome.json")

if [ ! -f "$here/baseline.json" ]; then
    zbench gate "$run" --policy "$here/gate.yaml" --save "$out/baseline.json"
    echo "no baseline to gate against. If this run is right, commit it: cp $out/baseline.json $here/baseline.json" >&2
    exit 2
fi

code=0
zbench gate "$run" --baseline "$here/baseline.json" --policy "$here/gate.yaml" \
    --write "junit=$out/gate.xml" --write "markdown=$out/gate.md" ${GITHUB_ACTIONS:+--github} || code=$?

if [ -n "${ZBENCH_HISTORY:-}" ]; then
    commit=${GITHUB_SHA:-$(git -C "$here" rev-parse HEAD 2>/dev/null || true)}
    url=${GITHUB_RUN_ID:+$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/actions/runs/$GITHUB_RUN_ID}
    zbench history add "$run" --file "$ZBENCH_HISTORY" ${commit:+--commit "$commit"} ${url:+--url "$url"}
    zbench history show --file "$ZBENCH_HISTORY" --html "$out/history.html"
fi
exit "$code"
