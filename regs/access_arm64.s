#include "textflag.h"

// func load32(address uintptr) uint32
TEXT ·load32(SB), NOSPLIT, $0-12
	MOVD address+0(FP), R0
	MOVWU (R0), R1
	DMB $1 // OSHLD: later loads come after this one
	MOVW R1, ret+8(FP)
	RET

// func store32(address uintptr, v uint32)
TEXT ·store32(SB), NOSPLIT, $0-12
	MOVD address+0(FP), R0
	MOVWU v+8(FP), R1
	DMB $2 // OSHST: earlier stores come before this one
	MOVW R1, (R0)
	RET
