// The library's version. Before 1.0 a minor version may change the API: see docs/compatibility.md.
#pragma once

#define DIFFKV_VERSION_MAJOR 0
#define DIFFKV_VERSION_MINOR 1
#define DIFFKV_VERSION_PATCH 0
