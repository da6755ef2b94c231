# Read by each run.sh: enters the folder to work in, and makes the demo's model and text there.
#
# Sets `here`, the example's folder. RAYTUNE_DEMO: the demo's folder of an earlier `raytune demo`.

here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d "${TMPDIR:-/tmp}/$(basename "$here")-XXXXXX")}
mkdir -p "$work"
cd "$work"
echo "working in $PWD"

[ -z "${RAYTUNE_DEMO:-}" ] || ln -s "$RAYTUNE_DEMO" demo
raytune demo demo
