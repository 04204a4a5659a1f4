#!/usr/bin/env bash
# Installs the Debian packages that building and testing need, where they are missing.
# usage: scripts/setup.sh USE...   with USE one of build, test, lint, coverage (see packages.txt)
# Exit codes: 0 everything is there, 1 apt failed, 2 something is missing and may not be installed.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -eq 0 ]; then
  echo "usage: scripts/setup.sh USE...  (build, test, lint, coverage)" >&2
  exit 2
fi
for use in "$@"; do
  if ! grep -q "^$use " packages.txt; then
    echo "setup: unknown use '$use', expected build, test, lint or coverage" >&2
    exit 2
  fi
done

if ! command -v dpkg-query > /dev/null; then
  echo "setup: no dpkg here, so nothing is checked or installed; scripts/packages.txt says what" \
    "the build needs"
  exit 0
fi

missing=()
while read -r use package version; do
  case " $* " in *" $use "*) ;; *) continue ;; esac
  # shellcheck disable=SC2016  # dpkg-query expands ${...}
  state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)
  [ "$state" = installed ] || missing+=("$package=$version")
done < <(grep -v '^#' packages.txt)

if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi

# shellcheck source=/dev/null
. /etc/os-release
if [ "${ID:-} ${VERSION_ID:-}" != "debian 12" ]; then
  echo "setup: this is ${PRETTY_NAME:-an unknown system}, the packages are those of Debian 12;" \
    "install what stands for: ${missing[*]}" >&2
  exit 2
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! sudo -n true 2> /dev/null; then
    echo "setup: packages are missing and this user may not install them. As root, run:" >&2
    quoted=$(printf " '%s'" "${missing[@]}")
    echo "  apt-get update && apt-get install --no-install-recommends$quoted" >&2
    exit 2
  fi
  as_root=(sudo -n)
fi

echo "setup: installing ${missing[*]}"
apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq)
"${apt[@]}" update || exit 1
"${apt[@]}" install -y --no-install-recommends "${missing[@]}" || exit 1
