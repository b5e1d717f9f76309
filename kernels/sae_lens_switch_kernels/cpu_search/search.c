/* The k largest of every row, exact, of which a part after the other is given while it is in cache.
 *
 * Compiled on the machine that runs it, by compile.py. Vectors are GCC's, which Clang has as well. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define COUNTED_AT_ONCE 16384 /* keys: so few that no lane of 16 bits overflows */

#define KEY int16_t
#define UNSIGNED uint16_t
#define HIGHEST INT16_MAX
#define LOWEST INT16_MIN
#define INFINITY_BITS 0x7f80
#define NAME(f) f##_bfloat16
#include "search_rows.h"

#define KEY int32_t
#define UNSIGNED uint32_t
#define HIGHEST INT32_MAX
#define LOWEST INT32_MIN
#define INFINITY_BITS 0x7f800000
#define NAME(f) f##_float32
#include "search_rows.h"
