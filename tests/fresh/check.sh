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

# Let pip in the root see the indexes, certificates and archives that it sees here. Copied before
# anything is mounted: pip may be set up by files, by environment variables, or not at all.
copy_pip_setup() {
	local path
	for path in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs; do
		[ -e "$path" ] || continue
		mkdir -p "$FRESH_ROOT$(dirname "$path")"
		rm -rf "${FRESH_ROOT:?}$path"
		cp -aL "$path" "$FRESH_ROOT$path"
	done
	env | grep '^PIP_' | sed "s/=\(.*\)/='\1'/; s/^/export /" >"$FRESH_ROOT/etc/pip-environment" || true
	python3 -m pip config list | grep -E 'find-links|index-url' | grep -oE "(file://)?/[^' ]+" | sed 's,^file://,,' |
		sort -u | while read -r path; do
		[ -d "$path" ] || continue
		mkdir -p "$FRESH_ROOT$path"
		mount --bind -o ro "$path" "$FRESH_ROOT$path"
	done
}

mount_kernel_folders() {
	mount -t proc proc "$FRESH_ROOT/proc"
	mount --rbind /sys "$FRESH_ROOT/sys"
	mount --rbind /dev "$FRESH_ROOT/dev"
}

echo "debootstrap $SUITE with $packages"
rm -rf --one-file-system "${FRESH_ROOT:?}"
debootstrap --variant=minbase --include="ca-certificates,$(echo "$packages" | tr -s ' ' ',')" \
	"$SUITE" "$FRESH_ROOT" >"$FRESH_ROOT.log" 2>&1 || { tail -n 20 "$FRESH_ROOT.log" >&2; exit 1; }
cp /etc/resolv.conf "$FRESH_ROOT/etc/resolv.conf"
cp /etc/hosts "$FRESH_ROOT/etc/hosts"
copy_pip_setup
mount_kernel_folders
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
