#!/bin/sh
# Builds and runs test_adamw.cc, plainly and under each sanitizer. CXX chooses the compiler.
set -eu

source=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cxx=${CXX:-c++}

# $1: name, the rest: flags. The kernels are compiled as in CMakeLists.txt, at -O2.
run() {
  name=$1
  shift
  flags="-std=c++17 -O2 -g -Wall -Wextra -ffp-contract=off $*"
  arithmetic="-ftree-vectorize -fno-math-errno -fno-trapping-math"
  objects=
  isa() {
    isa_name=$1
    shift
    $cxx $flags $arithmetic "$@" -DADAMW_ISA="$isa_name" -I"$source" \
      -c "$source/isa/update_isa.cc" -o "$build/$isa_name.o"
    objects="$objects $build/$isa_name.o"
  }
  isa baseline
  case $($cxx -dumpmachine) in
    x86_64*)
      isa avx2 -mavx2
      isa avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
      flags="$flags -DADAMW_X86"
      ;;
  esac
  $cxx $flags -I"$source" "$source/checks/test_adamw.cc" "$source/isa/isa.cc" "$source/tree.cc" $objects \
    -pthread -o "$build/test_adamw"
  echo "== $name"
  ${EMULATOR:-} "$build/test_adamw"
}

if [ "${1:-}" = plain ]; then
  run plain ${CXXFLAGS:-}
  exit
fi
run plain ${CXXFLAGS:-}
run address -fsanitize=address -fno-omit-frame-pointer
run undefined -fsanitize=undefined -fno-sanitize-recover=all
run thread -fsanitize=thread
