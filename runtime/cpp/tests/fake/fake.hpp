/// What a test sets in the stand-ins for CUDA and TensorRT, and what they saw.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

struct Fake {
    int devices = 1;
    std::size_t memory = std::size_t{1} << 30;  // free, on the GPU
    std::size_t activations = 4;                // bytes that a context needs for each number of its input; 0 fails
    bool failing = false;                       // enqueueV3 does, halfway
    bool wrong_channel = false;                 // what runs answers with another green
    bool wrong_replay = false;                  // what runs a second time answers with another red
    bool has_finite = false;                    // whether engines say whether their answer was finite
    float finite = 0;                           // what they say then of the last image
    int driver = 13000;
    std::string kernels;  // what the cache of TensorRT for RTX was given, and gives

    int device = 0;  // the current one
    int contexts = 0;
    bool host_code_allowed = false;
    bool cuda_graphs = false;  // those of TensorRT for RTX
    bool in_order = true;      // whether the contexts, which share their memory, ran as they were enqueued
    std::vector<std::string> calls;
    std::size_t count(const std::string& call) const;
};

extern Fake fake;
