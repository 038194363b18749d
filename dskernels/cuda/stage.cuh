// A warp's position in a ring of STAGES buffers: the index of the buffer, and the phase with which its barriers are waited for, which alternates with
// every round. The constant STAGES has to be defined before this file is included.
#pragma once

#include "ptx.cuh"

struct Stage {
    int index = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++index == STAGES) index = 0, phase ^= 1;
    }
};
