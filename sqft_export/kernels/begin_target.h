/* Functions between this file and end_target.h are compiled for TARGET. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target(TARGET))), apply_to = function)
#else
#define PRAGMA(x) _Pragma(#x)
#define FOR(target_) PRAGMA(GCC target(target_))
#pragma GCC push_options
FOR(TARGET)
#endif
