// One table of kernels per instruction-set level, chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "chain_kernels.h"
#include "kernels.h"

namespace ebmfast {

struct Level {
    const Kernels* kernels;
    const ChainKernels* chain;
    bool supported;  // by this CPU and operating system
};

const std::vector<Level>& levels();  // in ascending order; the first runs everywhere
const Kernels& kernels();            // the level in use: the highest supported one, unless set_level chose another
const ChainKernels& chain_kernels();  // of the same level
void set_level(const std::string& name);  // "" for the highest; throws std::invalid_argument naming the levels

}  // namespace ebmfast
