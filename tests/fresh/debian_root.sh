# Functions for scripts that make a Debian root with debootstrap and run commands in it. Sourced.

# Let pip in a root see the indexes, certificates and archives that it sees here. Call it before
# anything is mounted there: pip may be set up by files, by environment variables, or not at all.
copy_pip_setup() { # root
	local path
	for path in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs; do
		[ -e "$path" ] || continue
		mkdir -p "$1$(dirname "$path")"
		rm -rf "${1:?}$path"
		cp -aL "$path" "$1$path"
	done
	env | grep '^PIP_' | sed "s/=\(.*\)/='\1'/; s/^/export /" >"$1/etc/pip-environment" || true
}

# Makes the folders of archives that pip's settings name visible in a root.
mount_pip_archives() { # root
	local path
	python3 -m pip config list | grep -E 'find-links|index-url' | grep -oE "(file://)?/[^' ]+" |
		sed 's,^file://,,' | sort -u | while read -r path; do
		[ -d "$path" ] || continue
		mkdir -p "$1$path"
		mount --bind -o ro "$path" "$1$path"
	done
}

mount_kernel_folders() { # root
	mount -t proc proc "$1/proc"
	mount --rbind /sys "$1/sys"
	mount --rbind /dev "$1/dev"
}

# Makes a root with some packages, comma-separated; `$1.log` is the log.
make_root() { # root, suite, packages
	rm -rf --one-file-system "${1:?}"
	mkdir -p "$1"
	debootstrap --variant=minbase --include="$3" "$2" "$1" >"$1.log" 2>&1 ||
		{ tail -n 20 "$1.log" >&2; return 1; }
	cp /etc/resolv.conf "$1/etc/resolv.conf"
	cp /etc/hosts "$1/etc/hosts"
}
