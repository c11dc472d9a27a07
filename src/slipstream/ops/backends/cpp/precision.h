// A library is compiled for one kind of number, by -D'FOR_f32(...)=__VA_ARGS__': nobody waits for double precision who does not
// ask for it. What stands in FOR_ of another kind is left out.
#pragma once

#ifndef FOR_f32
#define FOR_f32(...)
#endif
#ifndef FOR_f64
#define FOR_f64(...)
#endif
#ifndef FOR_c64
#define FOR_c64(...)
#endif
#ifndef FOR_c128
#define FOR_c128(...)
#endif
