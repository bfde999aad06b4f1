"""Work shared among the threads of a kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llava_triton.kernels import cpu

# One thread dawdles at its first item until the others have taken what they can.
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <omp.h>
#include "sharing.h"

int main(int, char** argv) {
  const int items = std::atoi(argv[1]), threads = std::atoi(argv[2]);
  std::vector<std::atomic<int>> taken(items), of_thread(threads);
  std::atomic<int> done{0};
  Shares shares(items, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    shares.begin(thread, team);
#pragma omp barrier
    for (int64_t item; (item = shares.take(thread, team)) >= 0;) {
      ++taken[item];
      ++of_thread[thread];
      while (thread == 0 && done < team - 1) {
      }
    }
    ++done;
  }
  for (const auto& times : taken) std::printf("%d ", times.load());
  std::printf("\n%d\n", of_thread[0].load());
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shares")
    source, program = folder / "shares.cpp", folder / "shares"
    source.write_text(PROGRAM)
    headers = Path(cpu.__file__).parent
    flags = ["-std=c++17", "-O2", "-fopenmp", f"-I{headers}"]
    subprocess.run(["c++", *flags, str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("items", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_item_is_taken_once_and_none_waits_for_a_slow_thread(
    program: Path, items: int, threads: int
) -> None:
    done = subprocess.run(
        [str(program), str(items), str(threads)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    taken, by_the_slow_one = done.stdout.splitlines()
    assert taken.split() == ["1"] * items
    assert int(by_the_slow_one) <= 1 or threads == 1
