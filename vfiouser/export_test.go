package vfiouser

// FD is the server's socket.
func (s *Server) FD() int { return s.conn.FD() }
