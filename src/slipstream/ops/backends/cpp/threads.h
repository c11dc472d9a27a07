// Threads of a parallel region, also where the compiler knows no OpenMP.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>

inline int64_t n_threads() { return omp_get_max_threads(); }
inline int64_t this_thread() { return omp_get_thread_num(); }
#else
inline int64_t n_threads() { return 1; }
inline int64_t this_thread() { return 0; }
#endif
