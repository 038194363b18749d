// Where a warp is in a ring of STAGES buffers, a constant that is there before this file is included: which buffer, and the phase of its
// barriers, which changes with every round.
#pragma once

#include "ptx.cuh"

struct Stage {
    int index = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++index == STAGES) index = 0, phase ^= 1;
    }
};
