#!/bin/bash
# Tries the README's commands on a bare Debian: debootstrap makes a root with the packages of the
# README's own apt line and nothing else, an ordinary user whose home folder has a space in its name
# clones the last commit, and runs each command. Prints the time and the last lines of each.
#
#     make fresh-check                        # make demo, then make test
#     make fresh-check COMMANDS="make demo"   # commands are separated by ';'
#
# Needs root and debootstrap. FRESH_ROOT: where the root is made (deleted at the next start).
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/fresh/debian_root.sh

SUITE=${SUITE:-bookworm}
FRESH_ROOT=${FRESH_ROOT:-/var/tmp/raytune-fresh}
COMMANDS=${COMMANDS:-make demo; make test}
ACCOUNT=newcomer
HOME_FOLDER="/home/new comer"

if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
	echo "fresh-check makes a Debian root: run it as root, with debootstrap installed" >&2
	exit 1
fi
# Namespaces of its own: what is mounted and started below goes with this process.
if [ -z "${FRESH_INSIDE:-}" ]; then
	FRESH_INSIDE=1 exec unshare --mount --pid --fork --kill-child --propagation private -- bash "$0" "$@"
fi

# The packages that the README asks for, from the line that a reader copies.
packages=$(sed -n 's/^ *\(sudo \)\?apt-get install \(-y \)\?\(python3 .*\)$/\3/p' README.md | head -n 1)
[ -n "$packages" ] || { echo "README.md has no 'apt-get install python3 ...' line" >&2; exit 1; }

echo "debootstrap $SUITE with $packages"
make_root "$FRESH_ROOT" "$SUITE" "ca-certificates,$(echo "$packages" | tr -s ' ' ',')"
copy_pip_setup "$FRESH_ROOT"
mount_pip_archives "$FRESH_ROOT"
mount_kernel_folders "$FRESH_ROOT"
chroot "$FRESH_ROOT" useradd --home-dir "$HOME_FOLDER" --create-home --shell /bin/bash "$ACCOUNT"
git clone --quiet --no-hardlinks . "$FRESH_ROOT$HOME_FOLDER/raytune_llama"
chroot "$FRESH_ROOT" chown -R "$ACCOUNT:$ACCOUNT" "$HOME_FOLDER"

status=0
number=0
while IFS= read -r command; do
	command=$(echo "$command" | sed 's/^ *//; s/ *$//')
	[ -n "$command" ] || continue
	number=$((number + 1))
	log="$FRESH_ROOT.$number.log"
	echo
	echo "\$ $command"
	started=$SECONDS
	code=0
	# As a login: its own environment and signals, nothing of this process comes along.
	chroot "$FRESH_ROOT" setpriv --reuid="$ACCOUNT" --regid="$ACCOUNT" --init-groups --reset-env \
		env --default-signal bash -c "
		. /etc/pip-environment; cd '$HOME_FOLDER/raytune_llama' && $command" \
		</dev/null >"$log" 2>&1 || code=$?
	tail -n "${LINES_SHOWN:-12}" "$log"
	grep -hE '^(SKIPPED|FAILED|ERROR) ' "$log" | sort | uniq -c || true
	echo "-- exit $code after $((SECONDS - started)) s; the whole output is in $log"
	[ "$code" = 0 ] || status=1
done < <(echo "$COMMANDS" | tr ';' '\n')
exit $status
