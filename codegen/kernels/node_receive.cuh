// exchange_receive.cuh, of rows that came from several nodes (nodes.cuh).
#pragma once
#include "exchange_receive.cuh"
#include "transport.cuh"
