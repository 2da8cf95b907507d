/* The constants of attention's own exponential function and hyperbolic tangent, so that both are the same bits wherever
 * fused multiply-adds are rounded once. The scalar and the vector forms take the same steps.
 *
 * exp(x), x <= 0: t = x * log2(e) + 1.5 * 2^23 holds the integer n nearest to x * log2(e) in its low bits; r = x - n *
 * ln 2 is exact but for the low part of ln 2, since the upper one has 9 bits; e^r = 1 + r + r^2 P(r). P is the minimax
 * polynomial (Lawson's iteration) of (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2: error 7.5e-9 of e^r before its own
 * coefficients are rounded, 1.1e-8 after. At n = -127 the factor 2^n, made of exponent bits, is 0: so is the result
 * from -87.7 down to minus infinity.
 *
 * tanh(x): up to 0.625 x + x z Q(z), z = x^2, Q minimax of (tanh(x) / x - 1) / z, error 1.6e-8, 2.0e-8 once they are
 * rounded; above it (1 - e) / (1 + e), e = exp(-2 |x|). Both are odd, and NaN goes through. */
#define QZ_EXP_LOWEST (-88.0f)
#define QZ_EXP_LOG2_E 0x1.715476p+0f
#define QZ_EXP_LN2_HIGH 0.693359375f
#define QZ_EXP_LN2_LOW (-0x1.bd0106p-13f)
#define QZ_EXP_ROUND 0x1.8p23f
#define QZ_EXP_P0 0.5f
#define QZ_EXP_P1 0x1.5554dcp-3f
#define QZ_EXP_P2 0x1.5554b8p-5f
#define QZ_EXP_P3 0x1.120b72p-7f
#define QZ_EXP_P4 0x1.6d7546p-10f

#define QZ_TANH_SMALL 0.625f
#define QZ_TANH_Q0 (-0x1.555552p-2f)
#define QZ_TANH_Q1 0x1.110e3ep-3f
#define QZ_TANH_Q2 (-0x1.b92c1cp-5f)
#define QZ_TANH_Q3 0x1.583a0cp-6f
#define QZ_TANH_Q4 (-0x1.909eb4p-8f)
