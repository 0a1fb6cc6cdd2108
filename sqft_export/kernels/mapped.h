/* Pages of mapped files, for C++. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sqft {

/* Remove pages of a mapped file from memory after they were copied, if `data` lies in one. They are
   read again when they are used again. Other memory is not touched: its content would be lost. */
inline void drop_mapped_pages(const void *data, size_t size) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + size;
  FILE *maps = fopen("/proc/self/maps", "r");
  if (!maps) return;
  char line[4352];
  while (fgets(line, sizeof line, maps)) {
    unsigned long from, to, inode;
    char rights[5];
    if (sscanf(line, "%lx-%lx %4s %*s %*s %lu", &from, &to, rights, &inode) != 4) continue;
    if (from > begin || end > to || !inode || rights[1] == 'w') continue;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (last > first) madvise(reinterpret_cast<void *>(first), last - first, MADV_DONTNEED);
  }
  fclose(maps);
#endif
}

}  // namespace sqft
