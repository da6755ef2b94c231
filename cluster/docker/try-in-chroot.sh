#!/bin/bash
# Runs the Dockerfile's steps in Debian roots that debootstrap makes, where there is no container
# daemon, and then trains two steps in the result: as its user, and without a compiler.
#
#     cluster/docker/try-in-chroot.sh [TARGET=cpu]
#
# Needs root, debootstrap, and pip's and Debian's servers; build arguments are taken from the
# environment (TORCH_INDEX_URL=...). IMAGE_ROOTS: where the roots are made, one a stage; those that
# are there are kept: delete a stage's folder to run it again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/fresh/debian_root.sh

TARGET=${1:-cpu}
IMAGE_ROOTS=${IMAGE_ROOTS:-/var/tmp/raytune-image}

if [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then
	echo "try-in-chroot makes Debian roots: run it as root, with debootstrap installed" >&2
	exit 1
fi
# Namespaces of its own: what is mounted and started below goes with this process.
if [ -z "${CHROOT_INSIDE:-}" ]; then
	CHROOT_INSIDE=1 exec unshare --mount --pid --fork --kill-child --propagation private -- bash "$0" "$@"
fi

# One instruction a line: without comments, with continued lines joined.
instructions() {
	awk '/^#/ || /^$/ { next } { if (sub(/\\$/, "")) { line = line $0; next } print line $0; line = "" }' \
		cluster/docker/Dockerfile
}

# The instructions of a stage, or those before the first one.
stage_instructions() { # stage, or nothing
	instructions | awk -v wanted="$1" '$1 == "FROM" { name = $4 } name == wanted'
}

# A stage lies in IMAGE_ROOTS/NAME; beside it are its environment, build arguments, user and folder.
build_stage() { # stage
	local stage=$1 root="$IMAGE_ROOTS/$1" kind rest
	[ ! -e "$root.done" ] || return 0
	stage_instructions "$stage" | grep -q . || { echo "no stage $stage in the Dockerfile" >&2; exit 1; }
	# Those that it needs first: nothing may be mounted in two roots at a time.
	for kind in $(stage_instructions "$stage" | sed -n 's/^FROM \([^ :]*\) AS .*/\1/p; s/^COPY --from=\([^ ]*\) .*/\1/p'); do
		build_stage "$kind"
	done
	echo "== stage $stage"
	while read -r kind rest <&3; do run_instruction "$kind" "$rest"; done 3< <(stage_instructions "$stage")
	umount -R "$root/proc" "$root/sys" "$root/dev"
	touch "$root.done"
}

run_instruction() { # instruction, its arguments; of the stage `stage` in `root`
	case $1 in
		FROM) begin_stage "${2%% *}" ;;
		ENV) echo "export $2" >>"$root.env" ;;
		ARG) add_argument "$2" ;;
		WORKDIR) mkdir -p "$root$2" && echo "$2" >"$root.folder" ;;
		USER) echo "$2" >"$root.user" ;;
		RUN) run_in_root "$(sed 's/--mount=[^ ]* *//g' <<<"$2")" ;;
		COPY) copy_files $2 ;;
		LABEL | CMD) ;;
		*) echo "instruction $1 is not known here" >&2 && exit 1 ;;
	esac
}

begin_stage() { # the stage or image that it begins with
	rm -rf --one-file-system "${root:?}"
	if [ "${1%%:*}" = debian ]; then
		local suite=${1#*:}
		make_root "$root" "${suite%-slim}" ca-certificates
		copy_pip_setup "$root"
		: >"$root.env" && echo / >"$root.folder" && echo 0 >"$root.user"
	else
		# Without what is mounted there.
		cp -ax --reflink=auto "$IMAGE_ROOTS/$1" "$root"
		for kind in env folder user; do cp "$IMAGE_ROOTS/$1.$kind" "$root.$kind"; done
	fi
	: >"$root.args"
	mount_kernel_folders "$root"
	mount_pip_archives "$root"
}

add_argument() { # NAME[=default]; a default before the first stage holds where the stage has none
	local name=${1%%=*} value
	value=$(stage_instructions "" | sed -n "s/^ARG $name=//p")
	[ "$name" = "$1" ] || value=${1#*=}
	echo "export $name='${!name:-$value}'" >>"$root.args"
}

run_in_root() { # command of the shell
	echo "RUN $1"
	chroot "$root" setpriv --reuid="$(cat "$root.user")" --regid="$(cat "$root.user")" --clear-groups \
		--reset-env env --default-signal sh -c "
		. /etc/pip-environment
		$(cat "$root.env" "$root.args")
		cd '$(cat "$root.folder")' || exit
		$1" </dev/null
}

copy_files() { # [--from=STAGE] SOURCE... TARGET
	local from="$PWD" target=${*: -1} source
	if [[ $1 == --from=* ]]; then from="$IMAGE_ROOTS/${1#--from=}" && shift; fi
	[[ $target == /* ]] || target="$(cat "$root.folder")/$target"
	for source in "${@:1:$#-1}"; do
		if [ -d "$from/$source" ]; then
			mkdir -p "$root$target"
			(cd "$from/$source" && tar --exclude=__pycache__ -c .) | tar -x -C "$root$target"
		elif [[ $target == */ ]]; then
			mkdir -p "$root$target" && cp -a "$from/$source" "$root$target"
		else
			mkdir -p "$root$(dirname "$target")" && cp -a "$from/$source" "$root$target"
		fi
	done
}

# Nothing of this root can compile, and nothing needs to.
try_image() {
	local root="$IMAGE_ROOTS/$TARGET"
	rm -rf "$root/tmp/try" && mkdir -m 777 "$root/tmp/try"
	cp cluster/docker/tiny_run.py "$root/tmp/try/"
	mount_kernel_folders "$root"
	run_in_root '! command -v cc && ! command -v gcc && ! command -v g++ && ! command -v clang'
	run_in_root 'id && raytune --help | head -n 3'
	run_in_root 'cd /tmp/try && python tiny_run.py && raytune pretrain run.yaml && ls run/pt_lora_model'
	run_in_root '! ls -d ~/.cache/torch_extensions'
	umount -R "$root/proc" "$root/sys" "$root/dev"
}

mkdir -p "$IMAGE_ROOTS"
build_stage "$TARGET"
try_image
echo "the image's steps work: target $TARGET, $(du -sxh "$IMAGE_ROOTS/$TARGET" | cut -f1)"
