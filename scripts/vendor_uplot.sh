#!/usr/bin/env bash
# Fetches the plotting library of `zeropipe report --html` into trainer/page/vendor, from npm, by version and digest.
set -euo pipefail
version=1.6.32
digest=4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d
target="$(cd "$(dirname "$0")/.." && pwd)/trainer/page/vendor"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm pack --silent "uplot@$version" >/dev/null
echo "$digest  uplot-$version.tgz" | sha256sum --check --quiet
tar xzf "uplot-$version.tgz"
mkdir -p "$target"
cp package/dist/uPlot.iife.min.js package/dist/uPlot.min.css "$target/"
cp package/LICENSE "$target/LICENSE.uPlot"
